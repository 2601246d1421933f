# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
A user's own images with captions, in the layout of the `imagefolder` of datasets: `metadata.jsonl` or `metadata.csv` names
the image of each line, relative to itself, and its caption. So a folder of the Hub is read as it is.
"""

import os
import posixpath

from visualchat.data.checks import InvalidExample, check_text, get_field
from visualchat.data.files import Record
from visualchat.data.formats import DESCRIBE, Context, Round


CAPTION_FIELDS = ("text", "caption")


def read_caption(record: Record, context: Context) -> list[Round]:
    """
    The record's question, or one from `DESCRIBE` if it has none; the caption as its answer. An image may have several
    captions, each on a line of its own. Several lines with the same image, question and caption are a fault.
    """
    name = find_inside(get_field(record.value, "file_name", str), "file_name")
    image = context.image("", name, "file_name")
    field = next((one for one in CAPTION_FIELDS if record.value.get(one) is not None), CAPTION_FIELDS[0])
    caption = check_text(get_field(record.value, field, str), field, "answer")
    is_asked = record.value.get("question") is not None
    question = get_field(record.value, "question", str).strip() if is_asked else ""
    if question:
        check_text(question, "question", "question")
    first = context.used.setdefault((record.file, repr((name, question, caption))), record.key)
    if first != record.key:
        raise InvalidExample("duplicate caption", field, f"{first} has the same image, question and caption")
    return [Round(question or context.random(record.file, record.key).choice(DESCRIBE), caption, (image,))]


def find_inside(name: str, field: str) -> str:
    """
    A path relative to the folder of the metadata, in the form that datasets gives it. Links are followed: in the cache of
    the Hub, each image is a link to a file elsewhere.

    Raises:
        InvalidExample: If the path leaves the folder, or is a URL. datasets refuses these as well.
    """
    path = posixpath.normpath(name.replace("\\", "/"))
    if "://" in name or os.path.isabs(path) or path == "." or path.split("/")[0] in ("", ".."):
        raise InvalidExample("missing image", field, f"expected the path of an image in the folder, got {name!r:.80}")
    return path
