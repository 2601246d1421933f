# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Writes scenes as PNG files, and conversations about them as JSON Lines that `visualchat train` reads:

| file | content |
|---|---|
| `train.jsonl`, `train/` | the conversations to learn from, and their images |
| `test.jsonl`, `test/` | conversations about other scenes of the same kinds of things |
| `names-1.jsonl`, `names-3.jsonl` | "What is this?" about one image of `test/`, and "What is in image k?" about three |
| `counts.jsonl` | "How many cats are in image 1?" about one image of `test/`; one to four are equally frequent |
| `unseen.jsonl`, `unseen/` | "What sort of thing is in image 1?" about kinds of things whose names are never trained |
"""

import json
import shutil
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from examples.pictures.conversations import ConversationMaker, list_questions, make_round, make_scenes, split_kinds
from examples.pictures.kinds import Kind, list_kinds
from examples.pictures.parts import IMAGE_SIZE
from examples.pictures.scenes import Scene, draw_scene


SCENES = {"train": 16000, "test": 1600, "unseen": 240}
"""How many images there are of each kind. Training conversations use each several times."""

CONVERSATIONS = {"train": 8000, "test": 200, "names-1": 400, "names-3": 200, "counts": 400}


def make_data(folder: Path, font: Path, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> dict[str, list[Scene]]:
    """
    Writes the files to `folder`, which appears when it is complete. One that is there is kept.

    Args:
        folder (`Path`): Where the files go.
        font (`Path`): The colour font of the drawings.
        tokenizer (`PreTrainedTokenizerBase`): The decoder's.
        seed (`int`): Seed of scenes and conversations.

    Returns:
        `dict`: The scenes of the folders `train`, `test` and `unseen`; image number k is that of scene k.
    """
    trained, unseen = split_kinds(one_token_kinds(tokenizer), seed=seed)
    kinds = {"train": trained, "test": trained, "unseen": unseen}
    scenes = {split: make_scenes(kinds[split], count, split, seed) for split, count in SCENES.items()}
    if folder.exists():
        return scenes
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for split, those in scenes.items():
        (partial / split).mkdir(parents=True)
        for index, scene in enumerate(tqdm(those, desc=f"images of {split}")):
            draw_scene(scene, font, IMAGE_SIZE).save(image_path(partial, split, index))
    makers = {split: ConversationMaker(those, f"{split} {seed}") for split, those in scenes.items()}
    examples = {
        split: [makers[split].make_conversation() for _ in range(CONVERSATIONS[split])] for split in ("train", "test")
    }
    for count in (1, 3):
        name = f"names-{count}"
        examples[name] = [makers["test"].make_naming(count) for _ in range(CONVERSATIONS[name])]
    examples["counts"] = [makers["test"].make_counting() for _ in range(CONVERSATIONS["counts"])]
    examples["unseen"] = [ask_sort(scenes["unseen"], index) for index in makers["unseen"].single]
    for name, those in examples.items():
        split = name if name in SCENES else "test"
        with (partial / f"{name}.jsonl").open("w") as file:
            for number, example in enumerate(those):
                paths = [str(image_path(folder, split, index)) for index in example["scenes"]]
                row = {"id": f"{name} {number}", "messages": example["messages"], "images": paths, "kinds": example["kinds"]}
                file.write(json.dumps(row) + "\n")
    partial.rename(folder)
    return scenes


def one_token_kinds(tokenizer: PreTrainedTokenizerBase) -> list[Kind]:
    """
    The kinds of things whose name is one token after a blank. The projector's token of a thing is drawn to the embedding of
    its name ([`teach_words`]), which a name of several tokens does not have.
    """
    return [kind for kind in list_kinds() if len(tokenizer(f" {kind.name}", add_special_tokens=False)["input_ids"]) == 1]


def ask_sort(scenes: list[Scene], index: int) -> dict:
    question = next(one for one in list_questions([scenes[index]]) if one.kind == "sort")
    return {"scenes": [index], "messages": make_round(question, 1), "kinds": ["sort"]}


def image_path(folder: Path, split: str, index: int) -> Path:
    return folder / split / f"{index:05}.png"


def read_examples(path: Path) -> list[dict]:
    """The examples of a file, in its order."""
    return [json.loads(line) for line in path.read_text().splitlines()]
