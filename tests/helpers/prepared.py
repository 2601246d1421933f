"""What `visualchat prepare` wrote, for the tests of it."""

import json

import datasets


def load(folder):
    cache = folder.parent / "cache"
    return datasets.load_dataset(str(folder), split="train", cache_dir=str(cache)).cast_column(
        "images", datasets.List(datasets.Image(decode=False))
    )


def summary(output, source="llava"):
    return json.loads((output / source / "prepared.json").read_text(encoding="utf-8"))


def problems(path):
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(one["kind"], one["file"], one["row"], one["field"]) for one in found]
