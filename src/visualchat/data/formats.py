# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
How the records of each source become conversations: one small function for each format among the sources of `sources.py`
(that of own captions is in `captions.py`).

A function takes a raw record and the [`Context`], and returns the rounds of a conversation. It opens no image. It raises
`InvalidExample`, with the first fault, for a broken record, and `LeftOut` for one that the source's recipe leaves out.
Random choices depend on the seed, the source and the record's index or key alone.
"""

import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from visualchat.data.checks import (
    PLACEHOLDER,
    ImageReference,
    InvalidExample,
    LeftOut,
    Problem,
    check_text,
    check_turns,
    get_field,
)
from visualchat.data.files import RawFile, Record, index_images, read_records


MAX_IMAGES = 8  # images of a conversation; records with more are left out
DESCRIBE = [
    "What can you see in this image?",
    "Please describe the image.",
    "Tell me what this picture shows.",
    "Give a description of the image.",
    "What is in the picture?",
    "How would you put this image into words?",
    "Please say what is going on in this picture.",
    "Describe what you see here.",
    "What does the photo show?",
    "Write a caption for this image.",
]
WHY = [
    "Why?",
    "Why is that?",
    "Please say why.",
    "Give your reason.",
    "How do you know?",
    "What makes you think so?",
    "Explain your answer.",
]
ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"]
IMAGE_NAMES = [
    [f"image {letter}" for letter in "abcdefgh"],
    [f"image {letter}" for letter in "ABCDEFGH"],
    [f"the {ordinal} image" for ordinal in ORDINALS],
]


@dataclass(frozen=True)
class Round:
    """A question, the images that come with it, and its answer."""

    question: str
    answer: str
    images: tuple[ImageReference, ...] = ()

    # `prepared.json` keeps a digest of these texts. They stay as in version 0.1, so that its folders are recognized
    def __repr__(self) -> str:
        return f"Round(question={self.question!r}, answer={self.answer!r}, pictures={self.images!r})"


@dataclass(frozen=True)
class Sample:
    """A conversation, and the raw record that it comes from: the file, and the record's index or key in the file."""

    file: str
    key: str
    id: str
    rounds: tuple[Round, ...]

    def __repr__(self) -> str:  # see `Round`
        return f"Sample(file={self.file!r}, row={self.key!r}, id={self.id!r}, rounds={self.rounds!r})"


@dataclass(frozen=True)
class Source:
    """
    A public dataset, or a layout of own data: its files, and how they become conversations.

    Args:
        about (`str`): Its description in `visualchat prepare --list`, one line.
        files (`tuple[RawFile]`): The files with its records.
        images (`str`): The folder of its images (several folders are joined by ", "), or the JSON file that contains the
            images in base64.
        samples (`Callable`): Makes the samples from the context.
        concatenate (`int`): At most so many samples are joined to one example. The number is drawn at random. Each sample is
            used once.
        min_side (`int`): Samples with an image of fewer pixels in width or height are left out.
        known_images_only (`bool`): Whether a record without 1 to 8 images that all exist is left out and not reported.
    """

    about: str
    files: tuple[RawFile, ...]
    images: str
    samples: Callable[["Context"], Iterator[Sample]]
    concatenate: int = 1
    min_side: int = 1
    known_images_only: bool = False

    @property
    def paths(self) -> list[str]:
        """All raw files and folders, relative to the data root."""
        return [raw.path for raw in self.files] + self.images.split(", ")


class Context:
    """
    What all functions that read records of a source share: its settings, and the problems found so far. Of several records
    of a file with one id, the first whose text has no fault is used.

    Raises:
        FileNotFoundError: If a raw file or a folder of images is missing.
    """

    def __init__(self, name: str, source: Source, root: str | os.PathLike, seed: int = 0):
        self.name, self.source, self.root, self.seed = name, source, Path(os.path.abspath(root)), seed
        self.problems: list[Problem] = []
        self.left_out: Counter[str] = Counter()
        self.used: dict[tuple[str, str], str] = {}  # by file and id (or content), the key of the record that has it
        missing = [str(self.root / path) for path in self.source.paths if not (self.root / path).exists()]
        if missing:
            raise FileNotFoundError(f"the source {name} needs {', '.join(missing)}: no such file or folder")

    def records(self, files: Iterable[RawFile] | None = None) -> Iterator[Record]:
        for raw in self.source.files if files is None else files:
            yield from read_records(self.root, raw, self.problems.append)

    def random(self, *key: str) -> random.Random:
        """A generator that depends on the seed, the source and `key`, and on nothing that ran before."""
        return random.Random("-".join((str(self.seed), self.name, *key)))

    def image(self, folder: str, file: str, field: str) -> ImageReference:
        return ImageReference(os.path.join(self.root, folder, file), field)

    def attempt(self, function: Callable, record: Record, *args):
        """`function(record, self, *args)`; `None` if the record is invalid, left out, or has a used id, which is noted."""
        result, name = None, (record.file, record.id)
        try:
            if self.used.get(name, record.key) != record.key:
                detail = f"{record.id!r} is the id of example {self.used[name]} too"
                raise InvalidExample("duplicate id", record.id_field, detail)
            result = function(record, self, *args)
        except InvalidExample as bad:
            self.problems.append(Problem(bad.kind, record.file, record.key, bad.field, bad.detail))
            return None
        except LeftOut as reason:
            self.left_out[str(reason)] += 1
        self.used[name] = record.key
        return result


def convert_each(function: Callable[[Record, Context], Iterable[Round]]) -> Callable[[Context], Iterator[Sample]]:
    """The samples of a source in which every record is a conversation of its own. `function` makes its rounds."""

    def samples(context: Context) -> Iterator[Sample]:
        for record in context.records():
            rounds = context.attempt(function, record)
            if rounds is not None:
                yield make_sample(record, rounds)

    return samples


def make_sample(record: Record, rounds: Iterable[Round]) -> Sample:
    return Sample(record.file, record.key, f"{Path(record.file).stem}:{record.id}", tuple(rounds))


def read_llava(record: Record, context: Context) -> list[Round]:
    """All questions and answers. The image goes to the turn with its placeholder. Newlines in questions become blanks."""
    image = context.image("coco/train2017", get_field(record.value, "image", str), "image")
    turns = get_field(record.value, "conversations", list)
    check_turns(turns, ("human", "gpt"), "conversations", "from")
    texts = [get_field(turn, "value", str, f"conversations[{index}]") for index, turn in enumerate(turns)]
    placeholders = [text.count(PLACEHOLDER) for text in texts[::2]]
    if sum(placeholders) != 1:
        raise InvalidExample(
            "image count", "conversations", f"there is 1 image, but {sum(placeholders)} placeholders in the questions"
        )
    rounds = []
    for index, count in enumerate(placeholders):
        question = " ".join(texts[2 * index].replace(PLACEHOLDER, "\n").split("\n"))
        question = check_text(question, f"conversations[{2 * index}].value", "question")
        answer = check_text(texts[2 * index + 1], f"conversations[{2 * index + 1}].value", "answer")
        rounds.append(Round(question, answer, (image,) if count else ()))
    return rounds


def read_llava_first(record: Record, context: Context) -> list[Round]:
    """The first pair of question and answer."""
    first = read_llava(record, context)[0]
    if not first.images:
        raise InvalidExample("image count", "conversations[0].value", f"the first question does not contain {PLACEHOLDER!r}")
    return [first]


def read_instruction(record: Record, context: Context, known: dict | None) -> tuple[Round, list[str]]:
    """
    One MIMIC-IT record with all its images, and the ids of its related records.

    Args:
        known (`dict`, *optional*): Where the base64 strings of the images are, by image id. By default images are files of
            COCO, whose names are the image ids without the first 8 characters ("CGD_IMG_").
    """
    question = check_text(get_field(record.value, "instruction", str), "instruction", "question")
    answer = check_text(get_field(record.value, "answer", str), "answer", "answer")
    related = [str(one) for one in get_field(record.value, "rel_ins_ids", list)]
    ids = [str(one) for one in get_field(record.value, "image_ids", list)]
    if context.source.known_images_only and not (0 < len(ids) <= MAX_IMAGES and all(one in known for one in ids)):
        raise LeftOut(f"records without 1 to {MAX_IMAGES} known images")
    if not ids:
        raise InvalidExample("image count", "image_ids", "there is no image")
    images = []
    for index, one in enumerate(ids):
        field = f"image_ids[{index}]"
        if known is None:
            images.append(context.image("coco/train2017", f"{one[8:]}.jpg", field))
        elif one in known:
            images.append(ImageReference(str(context.root / context.source.images), field, known[one]))
        else:
            raise InvalidExample("missing image", field, f"{context.source.images} does not contain {one!r}")
    return Round(question, answer, tuple(images)), related


def convert_mimicit(context: Context, files: Iterable[RawFile] | None = None) -> Iterator[Sample]:
    """
    The samples of MIMIC-IT. A record and its related records, shuffled, are the rounds of one conversation about the same
    images, which come with the first round. Each record is used once, in the order of the file. A related record about other
    images, or about the same ones in another order, becomes a conversation of its own, since its text refers to them.
    """
    is_archive = context.source.images.endswith(".json")
    known = index_images(context.root, context.source.images, context.problems.append) if is_archive else None
    records = {record.key: record for record in context.records(files)}
    unused = {key: context.attempt(read_instruction, record, known) for key, record in records.items()}
    unused = {key: parsed for key, parsed in unused.items() if parsed is not None}
    for key, (_, related) in unused.items():
        for index, one in enumerate(related):
            if one not in records:
                detail = f"the file contains no record {one!r}"
                context.problems.append(Problem("unknown record", records[key].file, key, f"rel_ins_ids[{index}]", detail))
    for key in list(unused):
        if key not in unused:
            continue
        first, related = unused.pop(key)
        rounds = [first]
        for one in related:
            if one in unused and unused[one][0].images == first.images:
                rounds.append(unused.pop(one)[0])
        context.random(records[key].file, key).shuffle(rounds)
        yield make_sample(records[key], attach_images(first.images, rounds))


def attach_images(images: tuple[ImageReference, ...], rounds: Iterable[Round]) -> list[Round]:
    """The rounds with `images` in the first of them, and with no other images."""
    return [replace(one, images=() if index else images) for index, one in enumerate(rounds)]


def convert_llava_otter_blend(context: Context) -> Iterator[Sample]:
    """
    The samples of the blend. Each follows the images of one CGD conversation: for every image in turn, one or more of the
    llava and llava_dial conversations about it, drawn at random; then the CGD rounds. If the last image has no llava
    conversation, it comes with the first CGD round. If an earlier image has none, the CGD conversation is left out. A llava
    conversation is used for every CGD conversation that shows its image.
    """
    about = defaultdict(list)
    *single, dialogues, differences = context.source.files
    for files, function in ((single, read_llava_first), ([dialogues], read_llava)):
        for record in context.records(files):
            rounds = context.attempt(function, record)
            if rounds is not None:
                about[next(one for one in rounds if one.images).images[0].path].append(rounds)
    for sample in convert_mimicit(context, [differences]):
        images = sample.rounds[0].images
        if not all(image.path in about for image in images[:-1]):
            context.left_out["CGD conversations whose earlier image has no llava conversation"] += 1
            continue
        draw = context.random(sample.file, sample.key, "blend")
        blend, pending = [], ()
        for image in images:
            pending = (image,)
            if conversations := about.get(image.path):
                drawn = draw.sample(conversations, draw.randint(1, len(conversations)))
                blend += attach_images(pending, [one for rounds in drawn for one in rounds])
                pending = ()
        yield replace(sample, rounds=(*blend, *attach_images(pending, sample.rounds)))


def read_sparkles(record: Record, context: Context) -> list[Round]:
    """
    One dialogue. Images come with the user's turns; what the assistant's turns list as images is ignored. Texts refer to an
    image as IMAGE#id. This becomes a name by the image's number, in one style for the whole dialogue.
    """
    turns = get_field(record.value, "dialogue", list)
    check_turns(turns, ("user", "assistant"), "dialogue", "role")
    folder = os.path.join(record.file.split("/")[0], "images")
    free = list(context.random(record.file, record.key).choice(IMAGE_NAMES))
    images, names, texts = [], {}, []
    for index, turn in enumerate(turns):
        field = f"dialogue[{index}]"
        new_images = []
        for k, image in enumerate((turn.get("images") or []) if index % 2 == 0 else []):
            if not free:
                raise LeftOut(f"dialogues with more than {MAX_IMAGES} images")
            identity, name = str(get_field(image, "image_id", (str, int), f"{field}.images[{k}]")), free.pop(0)
            names.setdefault(f"IMAGE#{identity}", name)
            new_images.append(context.image(folder, f"{identity}.jpg", f"{field}.images[{k}].image_id"))
        images.append(tuple(new_images))
        text = get_field(turn, "content", str, field)
        text = re.sub(r"IMAGE#\w+", lambda found: names.get(found[0], found[0]), text)
        text = re.sub(r"\s*<Img><ImageHere></Img>", "", text)
        if unknown := re.search(r"IMAGE#\w*", text):
            raise InvalidExample(
                "image count", f"{field}.content", f"it refers to {unknown[0]}, but the images so far are {', '.join(names)}"
            )
        texts.append(check_text(text, f"{field}.content", "answer" if index % 2 else "question"))
    return [Round(*texts[index : index + 2], images[index]) for index in range(0, len(turns), 2)]


def read_minigpt4(record: Record, context: Context) -> list[Round]:
    """A question from `DESCRIBE`; the caption as its answer."""
    image = context.image("cc_sbu_align/image", f"{get_field(record.value, 'image_id', (str, int))}.jpg", "image_id")
    caption = check_text(get_field(record.value, "caption", str), "caption", "answer")
    return [Round(context.random(record.file, record.key).choice(DESCRIBE), caption, (image,))]


def read_coco_caption(record: Record, context: Context) -> list[Round]:
    """A question from `DESCRIBE`; one of the captions as its answer. The splits "val" and "test" are left out."""
    image = context.image("coco/2014", get_field(record.value, "filename", str), "filename")
    sentences = get_field(record.value, "sentences", list)
    captions = [get_field(one, "raw", str, f"sentences[{index}]") for index, one in enumerate(sentences)]
    if record.value.get("split") in ("val", "test"):
        raise LeftOut("records of a held-out split")
    draw = context.random(record.file, record.key)
    return [Round(draw.choice(DESCRIBE), draw.choice(check_texts(captions, "sentences")), (image,))]


def read_aokvqa(record: Record, context: Context) -> list[Round]:
    """The question with one of `WHY`; the right choice with one of the rationales."""
    number = get_field(record.value, "image_id", (int, str))
    image = context.image("coco/train2017", f"{number:0>12}.jpg", "image_id")
    question = check_text(get_field(record.value, "question", str), "question", "question")
    choices, index = get_field(record.value, "choices", list), get_field(record.value, "correct_choice_idx", int)
    if not 0 <= index < len(choices):
        raise InvalidExample("missing field", "correct_choice_idx", f"it is {index}, but there are {len(choices)} choices")
    choice = check_text(str(choices[index]), f"choices[{index}]", "answer").rstrip(".")
    draw = context.random(record.file, record.key)
    reason = draw.choice(check_texts(get_field(record.value, "rationales", list), "rationales")).rstrip(".")
    return [Round(f"{question} {draw.choice(WHY)}", f"The answer is {choice}. Because {reason}.", (image,))]


def read_ocr_vqa(record: Record, context: Context) -> list[Round]:
    """One of the pairs of question and answer. The validation and test splits (`split` is 2 or 3) are left out."""
    extension = os.path.splitext(get_field(record.value, "imageURL", str))[1]
    image = context.image("OCR_VQA/images", record.id + extension, "imageURL")
    questions, answers = get_field(record.value, "questions", list), get_field(record.value, "answers", list)
    if len(questions) != len(answers):
        raise InvalidExample("odd turns", "answers", f"{len(questions)} questions, but {len(answers)} answers")
    check_texts(questions, "questions", "question")
    check_texts(answers, "answers")
    if record.value.get("split") in (2, 3):
        raise LeftOut("records of a held-out split")
    question, answer = context.random(record.file, record.key).choice(list(zip(questions, answers)))
    return [Round(question.strip(), answer.strip(), (image,))]


def check_texts(texts: list, field: str, what: str = "answer") -> list[str]:
    """The texts, stripped, from which one is drawn: there must be at least one, and none may be empty."""
    if not texts:
        raise InvalidExample(f"empty {what}", field, "the list is empty")
    return [check_text(str(text), f"{field}[{index}]", what) for index, text in enumerate(texts)]
