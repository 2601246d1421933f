"""Examples that train, the command's arguments, and what a run leaves behind."""

import json
import shutil
from pathlib import Path

import datasets
import torch

from helpers.tiny import assistant, digit_image, make_model, make_processor, text_part


TEXT = datasets.Value("string")


FEATURES = datasets.Features(
    {
        "id": TEXT,
        "source": TEXT,
        "messages": [
            {
                "role": datasets.Value("string"),
                "content": [{"type": datasets.Value("string"), "text": datasets.Value("string")}],
            }
        ],
        "images": datasets.List(datasets.Image()),
    }
)


def make_row(index: int, images: int = 2, rounds: int = 2) -> dict:
    messages = []
    for turn in range(rounds):
        parts = [{"type": "image", "text": None}] * (images if turn == 0 else 0)
        answer = "zero one two three"[: 4 + 5 * (index % 3)]
        messages += [{"role": "user", "content": [*parts, text_part(f"Round {turn}?")]}, assistant(answer)]
    pictures = [digit_image(index + k) for k in range(images)]
    return {"id": str(index), "source": f"source {index % 2}", "messages": messages, "images": pictures}


def save_parts(root: Path) -> Path:
    """A tiny model's folder and a folder of rows: with several images, one, none, and unequal answers."""
    make_model(image_number_keys=True).save_pretrained(root / "model")
    make_processor().save_pretrained(root / "model")
    rows = [make_row(k, images=k % 4, rounds=1 + k % 2) for k in range(20)]
    (root / "data").mkdir()
    datasets.Dataset.from_list(rows, features=FEATURES).to_parquet(root / "data" / "shard-00000-of-00001.parquet")
    return root


def arguments(parts: Path, output: Path, **overrides) -> list[str]:
    settings = {
        "model_name_or_path": parts / "model",
        "datasets": parts / "data",
        "output_dir": output,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "max_length": 512,
        **overrides,
    }
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def undo_end(output: Path, *steps: int) -> None:
    """Leaves what a run had written before it was killed: without its end, and without the checkpoints of these steps."""
    shutil.rmtree(output / "model")
    for name in ("visualchat_run.json", "metrics.json", "log.json"):
        (output / name).unlink()
    for step in steps:
        shutil.rmtree(output / f"checkpoint-{step}")


def losses(output: Path) -> list[float]:
    log = json.loads((output / "log.json").read_text())
    return [float(entry["loss"]) for entry in log if "loss" in entry]


def moved(before: dict, after: dict) -> set[str]:
    return {name for name, weight in before.items() if not torch.equal(weight, after[name])}


ALIGNMENT = {
    "model.language_model.embed_tokens.weight",
    "model.multi_modal_projector.linear.weight",
    "model.multi_modal_projector.linear.bias",
    "model.multi_modal_projector.layer_norm.weight",
    "model.multi_modal_projector.layer_norm.bias",
}
