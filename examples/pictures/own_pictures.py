# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Makes a folder of pictures with captions, as a person may have one: it stands for yours in `docs/pictures.md`.

    python -m examples.pictures.own_pictures --output outputs/own

`train` and `test` hold drawings of 40 kinds of things, and a `metadata.jsonl` with a caption for each, such as "A cat on a
blue background.".
"""

import argparse
import json
from pathlib import Path
from random import Random

from tqdm import tqdm

from examples.pictures.conversations import describe
from examples.pictures.kinds import list_kinds
from examples.pictures.parts import IMAGE_SIZE
from examples.pictures.scenes import draw_scene, make_scene


KINDS = 40
PICTURES = {"train": 1600, "test": 200}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path, default=Path("outputs/parts"), help="folder of the pretrained parts")
    parser.add_argument("--output", type=Path, default=Path("outputs/own"), help="output folder")
    args = parser.parse_args(argv)
    kinds = Random("own").sample(list_kinds(), KINDS)
    for split, count in PICTURES.items():
        rng, folder = Random(split), args.output / split
        folder.mkdir(parents=True)
        with (folder / "metadata.jsonl").open("w") as file:
            for index in tqdm(range(count), desc=split):
                scene = make_scene([kinds[index % KINDS]], rng)
                draw_scene(scene, args.parts / "drawings/openmoji.ttf", IMAGE_SIZE).save(folder / f"{index:04}.png")
                file.write(json.dumps({"file_name": f"{index:04}.png", "text": describe(scene)}) + "\n")


if __name__ == "__main__":
    main()
