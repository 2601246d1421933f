"""Data and runs of `visualchat evaluate`, for the tests of it."""

import io
import json
from pathlib import Path

from PIL import Image

from helpers.tiny import assistant, digit_image, make_model, make_processor, text_part
from visualchat.cli import main as visualchat


CONVERSATIONS = {
    "digits": [
        ["What is this?", "pictures/0.png"],
        ["What's the difference?", "pictures/1.png ./pictures/2.png"],
        ["please describe the image."],
    ],
    "later": [["What is this?"], ["And this?", "pictures/3.png"]],
    "<b>short</b>": [["What is this? <script>alert(1)</script>", "pictures/4.png"]],
    "same length": [["What was this?", "pictures/5.png"], ["please describe the image."]],
    "special": [["What is <image> </s> ?", "pictures/6.png"], ["1 <s> 2"], ["3"]],
    "text": [["It's a cute black cat."], ["What is this?"], ["1 2 3"], ["4 5 6"]],
}


def save_tiny(folder: Path, seed: int = 0) -> Path:
    make_model(seed=seed, image_number_keys=True).save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


def make_row(index: int, images: int, rounds: int, root: str | None = None) -> dict:
    messages, tasks = [], []
    for turn in range(rounds):
        parts = [{"type": "image", "text": None}] * (images if turn == 0 else 0)
        question = {"role": "user", "content": [*parts, text_part(f"Round {turn}?")]}
        messages += [question, assistant("zero one two"[: 4 + 4 * (index % 3)])]
        tasks.append("first" if turn == 0 else "later")
    pictures = [encode(digit_image(index + k)) for k in range(images)]
    return {"id": f"row-{index}", "messages": messages, "images": pictures, "task": tasks}


def encode(picture: Image.Image) -> dict:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def run(root: Path, output: Path, *words, data=("--conversations", "eval.json"), model=("first",)) -> int:
    option, *names = data
    words = [*(root / name for name in model), option, *(root / name for name in names), *words]
    words += ["--output", output, "--max-new-tokens", 6, "--device", "cpu"]
    return visualchat(["evaluate", *map(str, words)])


def journal(output: Path, name: str = "answers.jsonl", model: str = "first") -> list[dict]:
    (folder,) = (path for path in output.iterdir() if path.name.endswith(model))
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def results(output: Path, root: Path, model: str = "first") -> dict:
    return json.loads((output / "results.json").read_text(encoding="utf-8"))["models"][str(root / model)]


def by_round(entries: list[dict]) -> dict:
    return {(entry["test_name"], entry["round"]): entry["answer"] for entry in entries}


LABELLED = ("--labelled", "rows.parquet")
