# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The sources of the paper's training data (DeepSpeed-VisualChat, arXiv 2309.14327): the table `SOURCES`. `formats.py`
turns their records into conversations. And the layouts of a user's own data: the table `OWN_SOURCES`.
"""

import os
from dataclasses import replace
from pathlib import Path

from visualchat.data.captions import CAPTION_FIELDS, read_caption
from visualchat.data.files import RawFile, find_one
from visualchat.data.formats import (
    Context,
    Source,
    convert_each,
    convert_llava_otter_blend,
    convert_mimicit,
    read_aokvqa,
    read_coco_caption,
    read_llava,
    read_llava_first,
    read_minigpt4,
    read_ocr_vqa,
    read_sparkles,
)


LLAVA = (RawFile("llava/detail_23k.json"), RawFile("llava/complex_reasoning_77k.json"))
LLAVA_DIAL = (RawFile("llava/conversation_58k.json"),)
CGD = (RawFile("MIMIC-IT/CGD_instructions.json", inside="data"),)
SPARKLES = tuple(RawFile(f"{name}/annotations/{name}.json") for name in ("SparklesDialogueCC", "SparklesDialogueVG"))


def mimicit_archive(name: str, about: str, known_images_only: bool = True) -> Source:
    """A part of MIMIC-IT whose images are base64 strings in a JSON file."""
    files = (RawFile(f"MIMIC-IT/{name}_instructions.json", inside="data"),)
    return Source(about, files, f"MIMIC-IT/{name}.json", convert_mimicit, known_images_only=known_images_only)


SOURCES = {
    "llava": Source(
        "LLaVA: descriptions and reasoning", LLAVA, "coco/train2017", convert_each(read_llava_first), concatenate=3
    ),
    "llava_dial": Source("LLaVA: dialogues", LLAVA_DIAL, "coco/train2017", convert_each(read_llava), concatenate=2),
    "otter_mimicit_cgd": Source("MIMIC-IT: general differences", CGD, "coco/train2017", convert_mimicit),
    "otter_mimicit_sd": mimicit_archive("SD", "MIMIC-IT: subtle differences", known_images_only=False),
    "otter_mimicit_sn": mimicit_archive("SN", "MIMIC-IT: scene navigation"),
    "otter_mimicit_tvc": mimicit_archive("TVC", "MIMIC-IT: television captions"),
    "otter_mimicit_vst": mimicit_archive("VST", "MIMIC-IT: visual stories"),
    "llava_otter_blend": Source(
        "LLaVA about each image, then MIMIC-IT about both",
        LLAVA + LLAVA_DIAL + CGD,
        "coco/train2017",
        convert_llava_otter_blend,
    ),
    "sparkles_dialogue": Source(
        "Sparkles: dialogues over several images",
        SPARKLES,
        "SparklesDialogueCC/images, SparklesDialogueVG/images",
        convert_each(read_sparkles),
    ),
    "minigpt4": Source(
        "MiniGPT-4: curated captions",
        (RawFile("cc_sbu_align/filter_cap.json", inside="annotations", id="image_id"),),
        "cc_sbu_align/image",
        convert_each(read_minigpt4),
    ),
    "coco_caption": Source(
        "COCO captions",
        (RawFile("coco_caption/dataset.json", inside="images", id="filename"),),
        "coco/2014",
        convert_each(read_coco_caption),
    ),
    "aokvqa": Source(
        "A-OKVQA: answers with reasons",
        (RawFile("aokvqa/annotations/aokvqa_v1p0_train.json", id="question_id"),),
        "coco/train2017",
        convert_each(read_aokvqa),
    ),
    "ocr_vqa": Source(
        "OCR-VQA: book covers", (RawFile("OCR_VQA/dataset.json"),), "OCR_VQA/images", convert_each(read_ocr_vqa), min_side=2
    ),
}
# Of the files of such a source, exactly one must be there
OWN_SOURCES = {
    "captions": Source(
        "your own images with captions, as in a Hub dataset of images",
        (RawFile("metadata.jsonl"), RawFile("metadata.csv", columns=(("file_name",), CAPTION_FIELDS))),
        ".",
        convert_each(read_caption),
    ),
}


def open_source(name: str, root: str | os.PathLike, seed: int = 0) -> Context:
    """
    Raises:
        ValueError: If there is no source of this name, or several files are there where one must be.
        FileNotFoundError: If a raw file or a folder of images is missing.
    """
    sources = SOURCES | OWN_SOURCES
    if name not in sources:
        raise ValueError(f"there is no source {name!r}: use one of {', '.join(sources)}")
    source = sources[name]
    if name in OWN_SOURCES:
        source = replace(source, files=(find_one(Path(root), source.files),))
    return Context(name, source, root, seed)
