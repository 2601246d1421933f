# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
How raw rows become conversations: one small function for each form that the sources of `sources.py` have.

A function takes a raw row and the [`Context`] and returns the rounds. It opens no picture. It raises `BadRow` for a row
that is broken, of which the first fault is named, and `LeftOut` for one that the recipe leaves out. Whatever is drawn is
drawn from the seed, the source and the row's place alone.
"""

import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from visualchat.data.checks import PLACEHOLDER, BadRow, LeftOut, Picture, Problem, check_turns, need, words
from visualchat.data.files import RawFile, Record, index_pictures, read_records


MAX_IMAGES = 8  # of one conversation, where a source has more
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
    """A question, the pictures that come with it, and its answer."""

    question: str
    answer: str
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Sample:
    """A conversation, and the raw row it comes from."""

    file: str
    row: str
    id: str
    rounds: tuple[Round, ...]


@dataclass(frozen=True)
class Source:
    """
    Args:
        about (`str`): One line for `--list`.
        files (`tuple[RawFile]`): Where the rows are.
        images (`str`): Folder of the pictures (several: joined by ", "), or the JSON file that holds them in base64.
        samples (`Callable`): Makes the samples from the context.
        concatenate (`int`): Each conversation joins one to so many samples, drawn at random; each sample is used once.
        min_side (`int`): Samples with a picture that is narrower or lower than so many pixels are left out.
        known_images_only (`bool`): Whether records without 1 to 8 pictures that exist are left out, rather than reported.
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
    What the row functions of a run share.

    Raises:
        FileNotFoundError: If a raw file or a folder of images is missing.
    """

    def __init__(self, name: str, source: Source, root: str | os.PathLike, seed: int = 0):
        self.name, self.source, self.root, self.seed = name, source, Path(os.path.abspath(root)), seed
        self.problems: list[Problem] = []
        self.left_out: Counter[str] = Counter()
        missing = [str(self.root / path) for path in self.source.paths if not (self.root / path).exists()]
        if missing:
            raise FileNotFoundError(f"the source {name} needs {', '.join(missing)}: no such file or folder")

    def records(self, files: Iterable[RawFile] | None = None) -> Iterator[Record]:
        for raw in self.source.files if files is None else files:
            yield from read_records(self.root, raw, self.problems.append)

    def random(self, *key: str) -> random.Random:
        """A generator that depends on the seed, the source and `key`, and on nothing that ran before."""
        return random.Random("-".join((str(self.seed), self.name, *key)))

    def picture(self, folder: str, file: str, field: str) -> Picture:
        return Picture(os.path.join(self.root, folder, file), field)

    def attempt(self, function: Callable, record: Record, *args):
        """`function(record, self, *args)`; None if the row is bad or left out, which is noted."""
        try:
            return function(record, self, *args)
        except BadRow as bad:
            self.problems.append(Problem(bad.kind, record.file, record.row, bad.field, bad.detail))
        except LeftOut as reason:
            self.left_out[str(reason)] += 1
        return None


def each(function: Callable[[Record, Context], Iterable[Round]]) -> Callable[[Context], Iterator[Sample]]:
    """The samples of a source whose rows have nothing to do with each other."""

    def samples(context: Context) -> Iterator[Sample]:
        for record in context.records():
            rounds = context.attempt(function, record)
            if rounds is not None:
                yield make_sample(record, rounds)

    return samples


def make_sample(record: Record, rounds: Iterable[Round]) -> Sample:
    return Sample(record.file, record.row, f"{Path(record.file).stem}:{record.id}", tuple(rounds))


def read_llava(record: Record, context: Context) -> list[Round]:
    """All pairs. The image sits in the turn that holds its placeholder; newlines in questions become blanks."""
    picture = context.picture("coco/train2017", need(record.value, "image", str), "image")
    turns = need(record.value, "conversations", list)
    check_turns(turns, ("human", "gpt"), "conversations", "from")
    texts = [need(turn, "value", str, f"conversations[{index}]") for index, turn in enumerate(turns)]
    placeholders = [text.count(PLACEHOLDER) for text in texts[::2]]
    if sum(placeholders) != 1:
        raise BadRow("image count", "conversations", f"1 image, but {sum(placeholders)} placeholders in the questions")
    rounds = []
    for index, count in enumerate(placeholders):
        question = " ".join(texts[2 * index].replace(PLACEHOLDER, "\n").split("\n"))
        question = words(question, f"conversations[{2 * index}].value", "question")
        answer = words(texts[2 * index + 1], f"conversations[{2 * index + 1}].value", "answer")
        rounds.append(Round(question, answer, (picture,) if count else ()))
    return rounds


def read_llava_first(record: Record, context: Context) -> list[Round]:
    """The first pair."""
    first = read_llava(record, context)[0]
    if not first.pictures:
        raise BadRow("image count", "conversations[0].value", f"the first question does not hold {PLACEHOLDER!r}")
    return [first]


def read_instruction(record: Record, context: Context, known: dict | None) -> tuple[Round, list[str]]:
    """
    One MIMIC-IT record, with all its pictures, and the ids of its related records.

    Args:
        known (`dict`, *optional*): Spans of the base64 pictures. By default, pictures are files of COCO, named by the
            image id without its first 8 characters ("CGD_IMG_").
    """
    question = words(need(record.value, "instruction", str), "instruction", "question")
    answer = words(need(record.value, "answer", str), "answer", "answer")
    related = [str(one) for one in need(record.value, "rel_ins_ids", list)]
    ids = [str(one) for one in need(record.value, "image_ids", list)]
    if context.source.known_images_only and not (0 < len(ids) <= MAX_IMAGES and all(one in known for one in ids)):
        raise LeftOut(f"records without 1 to {MAX_IMAGES} known images")
    if not ids:
        raise BadRow("image count", "image_ids", "there is no image")
    pictures = []
    for index, one in enumerate(ids):
        field = f"image_ids[{index}]"
        if known is None:
            pictures.append(context.picture("coco/train2017", f"{one[8:]}.jpg", field))
        elif one in known:
            pictures.append(Picture(str(context.root / context.source.images), field, known[one]))
        else:
            raise BadRow("missing image", field, f"{context.source.images} does not hold {one!r}")
    return Round(question, answer, tuple(pictures)), related


def mimicit(context: Context, files: Iterable[RawFile] | None = None) -> Iterator[Sample]:
    """
    A record and its related ones, shuffled, are the rounds of one conversation over the same pictures, which come with the
    first round. Each record is used once, in the order of the file. A related record over other pictures (or the same in
    another order) stays for a conversation of its own, since its text speaks of those.
    """
    is_archive = context.source.images.endswith(".json")
    known = index_pictures(context.root, context.source.images, context.problems.append) if is_archive else None
    records = {record.row: record for record in context.records(files)}
    waiting = {row: context.attempt(read_instruction, record, known) for row, record in records.items()}
    waiting = {row: parsed for row, parsed in waiting.items() if parsed is not None}
    for row, (_, related) in waiting.items():
        for index, one in enumerate(related):
            if one not in records:
                detail = f"the file holds no record {one!r}"
                context.problems.append(Problem("unknown record", records[row].file, row, f"rel_ins_ids[{index}]", detail))
    for row in list(waiting):
        if row not in waiting:
            continue
        first, related = waiting.pop(row)
        rounds = [first]
        for one in related:
            if one in waiting and waiting[one][0].pictures == first.pictures:
                rounds.append(waiting.pop(one)[0])
        context.random(records[row].file, row).shuffle(rounds)
        yield make_sample(records[row], bring(first.pictures, rounds))


def bring(pictures: tuple[Picture, ...], rounds: Iterable[Round]) -> list[Round]:
    """`rounds` with these pictures in the first of them, and no others."""
    return [replace(one, pictures=() if index else pictures) for index, one in enumerate(rounds)]


def llava_otter_blend(context: Context) -> Iterator[Sample]:
    """
    Over the pictures of each CGD conversation: for every picture in turn, one or more of the llava and llava_dial
    conversations about it, drawn at random; then the CGD rounds. The last picture may have no llava conversation and then
    comes with the first CGD round; a CGD conversation whose earlier picture has none is left out. A llava conversation
    serves every CGD conversation that shows its picture.
    """
    about = defaultdict(list)
    *single, dialogues, differences = context.source.files
    for files, function in ((single, read_llava_first), ([dialogues], read_llava)):
        for record in context.records(files):
            rounds = context.attempt(function, record)
            if rounds is not None:
                about[next(one for one in rounds if one.pictures).pictures[0].path].append(rounds)
    for sample in mimicit(context, [differences]):
        pictures = sample.rounds[0].pictures
        if not all(picture.path in about for picture in pictures[:-1]):
            context.left_out["CGD conversations whose earlier image has no llava conversation"] += 1
            continue
        draw = context.random(sample.file, sample.row, "blend")
        blend, pending = [], ()
        for picture in pictures:
            pending = (picture,)
            if conversations := about.get(picture.path):
                drawn = draw.sample(conversations, draw.randint(1, len(conversations)))
                blend += bring(pending, [one for rounds in drawn for one in rounds])
                pending = ()
        yield replace(sample, rounds=(*blend, *bring(pending, sample.rounds)))


def read_sparkles(record: Record, context: Context) -> list[Round]:
    """
    The user's turns bring images; what the assistant's turns list as images is ignored. Texts name an image as IMAGE#id,
    which becomes its place among the dialogue's images, in one style for the whole dialogue.
    """
    turns = need(record.value, "dialogue", list)
    check_turns(turns, ("user", "assistant"), "dialogue", "role")
    folder = os.path.join(record.file.split("/")[0], "images")
    free = list(context.random(record.file, record.row).choice(IMAGE_NAMES))
    pictures, names, texts = [], {}, []
    for index, turn in enumerate(turns):
        field = f"dialogue[{index}]"
        brought = []
        for k, image in enumerate((turn.get("images") or []) if index % 2 == 0 else []):
            if not free:
                raise LeftOut(f"dialogues with more than {MAX_IMAGES} images")
            identity, name = str(need(image, "image_id", (str, int), f"{field}.images[{k}]")), free.pop(0)
            names.setdefault(f"IMAGE#{identity}", name)
            brought.append(context.picture(folder, f"{identity}.jpg", f"{field}.images[{k}].image_id"))
        pictures.append(tuple(brought))
        text = need(turn, "content", str, field)
        text = re.sub(r"IMAGE#\w+", lambda found: names.get(found[0], found[0]), text)
        text = re.sub(r"\s*<Img><ImageHere></Img>", "", text)
        if unknown := re.search(r"IMAGE#\w*", text):
            raise BadRow("image count", f"{field}.content", f"it names {unknown[0]}, but there is {', '.join(names)} so far")
        texts.append(words(text, f"{field}.content", "answer" if index % 2 else "question"))
    return [Round(*texts[index : index + 2], pictures[index]) for index in range(0, len(turns), 2)]


def read_minigpt4(record: Record, context: Context) -> list[Round]:
    """A describe-the-image question; the caption."""
    picture = context.picture("cc_sbu_align/image", f"{need(record.value, 'image_id', (str, int))}.jpg", "image_id")
    caption = words(need(record.value, "caption", str), "caption", "answer")
    return [Round(context.random(record.file, record.row).choice(DESCRIBE), caption, (picture,))]


def read_coco_caption(record: Record, context: Context) -> list[Round]:
    """A describe-the-image question; one of the captions. Images of the splits "val" and "test" are left out."""
    picture = context.picture("coco/2014", need(record.value, "filename", str), "filename")
    sentences = need(record.value, "sentences", list)
    captions = [need(one, "raw", str, f"sentences[{index}]") for index, one in enumerate(sentences)]
    if record.value.get("split") in ("val", "test"):
        raise LeftOut("rows of a held-out split")
    draw = context.random(record.file, record.row)
    return [Round(draw.choice(DESCRIBE), draw.choice(some(captions, "sentences")), (picture,))]


def read_aokvqa(record: Record, context: Context) -> list[Round]:
    """The question and a "why?" phrase; the right choice, and one of the rationales."""
    number = need(record.value, "image_id", (int, str))
    picture = context.picture("coco/train2017", f"{number:0>12}.jpg", "image_id")
    question = words(need(record.value, "question", str), "question", "question")
    choices, index = need(record.value, "choices", list), need(record.value, "correct_choice_idx", int)
    if not 0 <= index < len(choices):
        raise BadRow("missing field", "correct_choice_idx", f"it is {index}, but there are {len(choices)} choices")
    choice = words(str(choices[index]), f"choices[{index}]", "answer").rstrip(".")
    draw = context.random(record.file, record.row)
    reason = draw.choice(some(need(record.value, "rationales", list), "rationales")).rstrip(".")
    return [Round(f"{question} {draw.choice(WHY)}", f"The answer is {choice}. Because {reason}.", (picture,))]


def read_ocr_vqa(record: Record, context: Context) -> list[Round]:
    """One of the pairs. Rows of the validation and test splits (`split` is 2 or 3) are left out."""
    extension = os.path.splitext(need(record.value, "imageURL", str))[1]
    picture = context.picture("OCR_VQA/images", record.id + extension, "imageURL")
    questions, answers = need(record.value, "questions", list), need(record.value, "answers", list)
    if len(questions) != len(answers):
        raise BadRow("odd turns", "answers", f"{len(questions)} questions, but {len(answers)} answers")
    some(questions, "questions", "question")
    some(answers, "answers")
    if record.value.get("split") in (2, 3):
        raise LeftOut("rows of a held-out split")
    question, answer = context.random(record.file, record.row).choice(list(zip(questions, answers)))
    return [Round(question.strip(), answer.strip(), (picture,))]


def some(texts: list, field: str, what: str = "answer") -> list[str]:
    """The texts that one is to be drawn from: at least one, and none of them empty."""
    if not texts:
        raise BadRow(f"empty {what}", field, "the list is empty")
    return [words(str(text), f"{field}[{index}]", what) for index, text in enumerate(texts)]
