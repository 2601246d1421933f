# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Tiny raw files of every source of training data, in the forms in which they are downloaded."""

import base64
import functools
import io
import json
import shutil
import tempfile
from pathlib import Path

from helpers.tiny import digit_image as draw_digit


digit_image = functools.cache(draw_digit)
COCO = "coco/train2017"


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_picture(path, digit=0, size=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = digit_image(digit)
    (picture.resize(size) if size else picture).save(path)


def as_base64(digit):
    buffer = io.BytesIO()
    digit_image(digit).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def llava(number, *pairs):
    """A row of LLaVA about image `number`; its first question holds the placeholder."""
    conversations = []
    for index, (question, answer) in enumerate(pairs):
        conversations.append({"from": "human", "value": question if index else f"{question}\n<image>"})
        conversations.append({"from": "gpt", "value": answer})
    return {"id": f"{number:012d}", "image": f"{number:012d}.jpg", "conversations": conversations}


def instruction(text, answer, images, related=()):
    return {"instruction": text, "answer": answer, "image_ids": images, "rel_ins_ids": list(related)}


def cgd(number):
    return f"CGD_IMG_{number:012d}"


def make_raw(root):
    """The raw files of all sources, each with a few rows, as they are downloaded."""
    for number in range(1, 7):
        write_picture(root / COCO / f"{number:012d}.jpg", number)
    detail = [llava(number, (f"Describe {number}.", f"Detail {number}.")) for number in (1, 2)]
    reasoning = [llava(number, (f"Reason {number}?", f"Reason {number}."), ("Sure?", "Sure.")) for number in (1, 3)]
    write_json(root / "llava/detail_23k.json", detail)
    write_json(root / "llava/complex_reasoning_77k.json", reasoning)
    dialogues = [llava(number, (f"Hello {number}?", "Hi."), ("More\nof it?", "No.")) for number in (1, 4, 5)]
    dialogues[2]["conversations"][0]["value"] = "Are you there?"
    dialogues[2]["conversations"][2]["value"] = "<image>\nWhat is it?"
    write_json(root / "llava/conversation_58k.json", dialogues)

    records = {
        "CGD_INS_1": instruction("What differs?", "One.", [cgd(1), cgd(2)], ["CGD_INS_2"]),
        "CGD_INS_2": instruction("And else?", "Two.", [cgd(1), cgd(2)], ["CGD_INS_1"]),
        "CGD_INS_3": instruction("Alike?", "No.", [cgd(6), cgd(1)], []),
        "CGD_INS_4": instruction("Which is red?", "None.", [cgd(3), cgd(6)], ["CGD_INS_5"]),
        "CGD_INS_5": instruction("Which first?", "The second.", [cgd(6), cgd(3)], ["CGD_INS_4"]),
    }
    write_json(root / "MIMIC-IT/CGD_instructions.json", {"meta": {"version": "1"}, "data": records})
    for name in ("SD", "SN", "TVC", "VST"):
        images = [f"{name}_IMG_{index}" for index in range(9)]
        write_json(root / f"MIMIC-IT/{name}.json", {image: as_base64(index) for index, image in enumerate(images)})
        few = {
            f"{name}_INS_0": instruction("What changed?", "This.", images[:2], [f"{name}_INS_1"]),
            f"{name}_INS_1": instruction("What else?", "That.", images[:2], [f"{name}_INS_0"]),
        }
        many = {
            f"{name}_INS_2": instruction("Eight?", "Yes.", images[1:]),
            f"{name}_INS_3": instruction("Nine?", "Too many.", images),
            f"{name}_INS_4": instruction("None?", "No.", []),
            f"{name}_INS_5": instruction("Known?", "No.", [images[0], "elsewhere"]),
        }
        write_json(root / f"MIMIC-IT/{name}_instructions.json", {"data": few if name == "SD" else few | many})

    mark = "<Img><ImageHere></Img>"
    dialogue = [
        {
            "role": "user",
            "content": f"Link IMAGE#1417{mark} and IMAGE#14 {mark}, please.",
            "images": [{"image_id": 1417, "caption": "a"}, {"image_id": 14, "caption": "b"}],
        },
        {"role": "assistant", "content": "IMAGE#14 is old, IMAGE#1417 is new."},
        {"role": "user", "content": f"And IMAGE#3{mark}?", "images": [{"image_id": 3, "caption": "c"}]},
        {"role": "assistant", "content": "It is like IMAGE#14.", "images": [{"image_id": 14}]},
    ]
    for name in ("SparklesDialogueCC", "SparklesDialogueVG"):
        crowd = [{"role": "user", "content": "Nine.", "images": [{"image_id": 3}] * 9}, dialogue[1]]
        rows = [{"id": f"{name}-{index}", "dialogue": dialogue} for index in range(4)] + [{"dialogue": crowd}]
        write_json(root / f"{name}/annotations/{name}.json", rows)
        for number in (1417, 14, 3):
            write_picture(root / f"{name}/images/{number}.jpg", number)

    captions = [{"image_id": "7", "caption": "A seven."}, {"image_id": "8", "caption": "An eight."}]
    write_json(root / "cc_sbu_align/filter_cap.json", {"annotations": captions})
    for number in (7, 8):
        write_picture(root / f"cc_sbu_align/image/{number}.jpg", number)
    images = [
        {
            "filename": f"COCO_{number}.jpg",
            "split": split,
            "sentences": [{"raw": f"One {number}."}, {"raw": f"Two {number}."}],
        }
        for number, split in ((1, "train"), (2, "restval"), (3, "test"))
    ]
    write_json(root / "coco_caption/dataset.json", {"images": images})
    for number in (1, 2):
        write_picture(root / f"coco/2014/COCO_{number}.jpg", number)
    question = {
        "image_id": 5,
        "question_id": "q1",
        "question": "What digit is it?",
        "choices": ["four", "five"],
        "correct_choice_idx": 1,
        "rationales": ["it looks so.", "it has a belly"],
    }
    write_json(root / "aokvqa/annotations/aokvqa_v1p0_train.json", [question])
    url = "http://ecx.images-amazon.com/images/I/51.png"
    books = {
        key: {"imageURL": url, "questions": ["Who wrote it?", "Title?"], "answers": ["Me", f"Book {key}"], "split": split}
        for key, split in (("111", 1), ("222", 1), ("333", 3))
    }
    write_json(root / "OCR_VQA/dataset.json", books)
    write_picture(root / "OCR_VQA/images/111.png", 1)
    write_picture(root / "OCR_VQA/images/222.png", 2, size=(1, 1))
    return root


@functools.cache
def _raw_once() -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory()
    make_raw(Path(folder.name))
    return folder


def copy_raw(root):
    """`make_raw`, faster: it is made once in a process."""
    return Path(shutil.copytree(_raw_once().name, root, dirs_exist_ok=True))
