# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The questions of an evaluation: conversations in DeepSpeed-VisualChat's released format, and labelled datasets."""

import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from modeling_visualchat.image_loading_visualchat import DATA_URL, ImageSource, check_not_too_thin, load_image, shorter_edge
from modeling_visualchat.messages_visualchat import fill_images
from visualchat.data.checks import IMAGE_TYPES, InvalidExample, check_conversation, find_image_source
from visualchat.evaluation.answers import text_of
from visualchat.training.dataset import count_images, load_examples


@dataclass
class Question:
    """
    The question of one round.

    Args:
        content (`list[dict]`): The content of the user's message: text parts, and image parts that name no image yet.
        image_path (`str`): The paths of the images, as the input names them, with blanks between them.
        label (`str`, *optional*): The true answer.
        task (`str`): The name under which its accuracy is reported.
    """

    content: list[dict]
    image_path: str = ""
    label: str | None = None
    task: str = ""

    @property
    def text(self) -> str:
        return text_of(self.content)


@dataclass
class Dialogue:
    """
    A conversation whose questions the model answers.

    Args:
        name (`str`): The name of the test, or the id of the example.
        where (`str`): The file or dataset with the example, as errors name it.
        questions (`list[Question]`): Its rounds.
        sources: Returns the paths, URLs or data of all images, in reading order.
        system (`list[dict]`): The system message, if there is one.
        fault (`str`): Why its questions cannot be asked. Then `questions` may be incomplete.
    """

    name: str
    where: str
    questions: list[Question]
    sources: Callable[[], list[ImageSource]]
    system: list[dict] = field(default_factory=list)
    fault: str = ""

    def messages(self, count: int, answers: list[str], images: list[Image.Image]) -> list[dict]:
        """
        The messages up to the question of round `count`. The earlier questions have their answers: the label, or the model's
        answer if there is no label.
        """
        messages = list(self.system)
        for k, question in enumerate(self.questions[:count]):
            messages.append({"role": "user", "content": question.content})
            if k < count - 1:
                messages.append({"role": "assistant", "content": answers[k] if question.label is None else question.label})
        return fill_images({"messages": messages, "images": images[: count_images(messages)]}, self.where)

    def open_images(self, image_processor=None) -> tuple[list[Image.Image], int, str]:
        """
        Args:
            image_processor (*optional*): The model's. Images that are too thin for it are faults.

        Returns:
            The images before the first one with a fault; the number of rounds that can be asked with them; and the fault, or
            an empty string.
        """
        images = []
        sources = iter(self.sources())
        for number, question in enumerate(self.questions, 1):
            for _ in range(count_images([{"content": question.content}])):
                where = f"{self.where}, round {number}"
                try:
                    image = load_image(next(sources), where)
                except (OSError, TypeError, ValueError) as error:
                    return images, number - 1, str(error)
                try:
                    check_not_too_thin(image.size, shorter_edge(image_processor))
                except ValueError as error:
                    return images, number - 1, f"{where}: {error}"
                images.append(image)
        return images, len(self.questions), ""

    @property
    def size(self) -> tuple[int, int, int]:
        """The number of rounds, images and characters. Batches of dialogues of similar size need little padding."""
        images = sum(count_images([{"content": question.content}]) for question in self.questions)
        return len(self.questions), images, sum(len(q.text) + len(q.label or "") for q in self.questions)


def read_conversations(path: Path, image_root: Path | None = None) -> tuple[list[Dialogue], str]:
    """
    Reads the released evaluation format: a JSON object of tests. Each test is a list of rounds, `[question]` or `[question,
    "path path …"]`. The rounds of a test are one conversation, in which the model's answers follow its questions.

    Args:
        path (`Path`): The JSON file.
        image_root (`Path`, *optional*): The folder of relative paths. By default the folder of the file.

    Returns:
        The dialogues, with a `fault` if they are malformed; and the SHA-256 of the file.

    Raises:
        ValueError: If the file is not such an object, or names a test twice. Syntax errors are given with line and column.
        FileNotFoundError: If there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    data = path.read_bytes()

    def without_repeats(pairs: list[tuple]) -> dict:
        repeated = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        if repeated:
            raise ValueError(f"{path}: the name {repeated[0]!r} occurs more than once: give each test its own")
        return dict(pairs)

    try:
        tests = json.loads(data, object_pairs_hook=without_repeats)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {error.lineno}, column {error.colno}: this is not JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: this is not JSON in UTF-8: {error}") from error
    if not isinstance(tests, dict) or not tests:
        raise ValueError(
            f'{path}: expected an object {{"name": [["question", "path path …"], …], …}} with one test at least, got'
            f" {json.dumps(tests):.80}"
        )
    root = path.parent if image_root is None else image_root
    return [_read_test(name, rounds, path, root) for name, rounds in tests.items()], hashlib.sha256(data).hexdigest()


def _read_test(name: str, rounds: list, path: Path, root: Path) -> Dialogue:
    where = f"{path}, {name}"
    questions, sources = [], []
    fault = "" if isinstance(rounds, list) and rounds else f"expected a list of rounds, got {rounds!r:.80}"
    for number, one in enumerate(rounds if not fault else [], 1):
        if not (isinstance(one, list) and len(one) in (1, 2) and all(isinstance(text, str) for text in one)):
            fault = f'round {number}: expected ["question"] or ["question", "path path …"], got {one!r:.80}'
            break
        if not one[0].strip():
            fault = f"round {number}: the question has no words"
            break
        paths = one[1].split() if len(one) == 2 else []
        content = [{"type": "image"}] * len(paths) + [{"type": "text", "text": one[0]}]
        questions.append(Question(content, " ".join(paths)))
        sources += [one if "://" in one or DATA_URL.match(one) else root / os.path.expanduser(one) for one in paths]
    return Dialogue(name, where, questions, lambda: sources, fault=f"{where}: {fault}" if fault else "")


def read_labelled(names: list[str]) -> tuple[list[Dialogue], str]:
    """
    Reads datasets of `messages` and `images`; see [`load_examples`]. Every answer is a label. Later rounds follow the true
    answers. Accuracy is reported by the column `task`, which contains one value for all answers or a list with one for
    each; without it, by `source`.

    Returns:
        The dialogues, with a `fault` if their example is broken; and the SHA-256 of all messages and tasks.

    Raises:
        ValueError: If a dataset cannot be read, has no column `messages` or no examples. It is named.
        FileNotFoundError: If there is no such file.
    """
    dialogues, digest = [], hashlib.sha256()
    for name in names:
        dataset = load_examples(name, extra_columns=("task",))
        for index, example in enumerate(dataset):
            digest.update(json.dumps([example["messages"], example.get("task")], sort_keys=True, default=repr).encode())
            dialogues.append(_read_example(name, index, example, functools.partial(_example_sources, dataset, index)))
    if not dialogues:
        raise ValueError(f"{', '.join(names)}: there are no examples")
    return dialogues, digest.hexdigest()


def _read_example(name: str, index: int, example: dict, sources: Callable[[], list[ImageSource]]) -> Dialogue:
    where = f"{name}, example {index}"
    dialogue = Dialogue(example.get("id") or str(index), where, [], sources)
    try:
        check_conversation(example)
        messages = example["messages"]
        if messages[0]["role"] == "system":
            dialogue.system, messages = messages[:1], messages[1:]
        task = example.get("task")
        tasks = task if isinstance(task, list) else [task] * (len(messages) // 2)
        if len(tasks) != len(messages) // 2:
            raise InvalidExample("missing field", "task", f"{len(tasks)} tasks for {len(messages) // 2} answers")
    except InvalidExample as error:
        dialogue.fault = f"{where}: {error}"
        return dialogue
    paths = iter(image["path"] or "" for image in example.get("images") or [])
    for question, answer, task in zip(messages[::2], messages[1::2], tasks):
        content = question["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        names, bare = [], []
        for part in parts:
            if part["type"] in IMAGE_TYPES:
                _, own = find_image_source(part)
                own = next(paths) if own is None else own
                names.append(own if isinstance(own, str) and len(own) < 256 else "")
            bare.append({"type": "image"} if part["type"] in IMAGE_TYPES else {"type": "text", "text": part["text"]})
        task = str(example["source"] if task is None else task)
        dialogue.questions.append(Question(bare, " ".join(filter(None, names)), text_of(answer["content"]), task))
    return dialogue


def _example_sources(dataset, index: int) -> list[ImageSource]:
    messages = fill_images(dataset[index], f"example {index}")
    parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
    return [find_image_source(part)[1] for part in parts if part["type"] in IMAGE_TYPES]
