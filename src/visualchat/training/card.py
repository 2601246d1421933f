"""The model card of a training run: what it was made of, how, and what was measured."""

import shutil
from pathlib import Path

import yaml


def write_card(folder: Path, model_args, data_args, training_args, table: str, metrics: dict, output_dir: Path) -> None:
    """
    Writes `README.md` into the model's folder, with the images that it shows.

    Args:
        folder (`Path`): The saved model, or adapter.
        table (`str`): The examples by source, as Markdown.
        metrics (`dict`): What was measured at the end of the run.
        output_dir (`Path`): The run's folder, with `curves.png` and `data.png`.
    """
    base = model_args.model_name_or_path
    parts = [model_args.vision_name_or_path, model_args.text_name_or_path]
    base_models = [part for part in parts if part] or [base]
    front = {
        "library_name": "peft" if model_args.mode == "lora" else "transformers",
        "pipeline_tag": "image-text-to-text",
        "base_model": base_models,
        "datasets": [name for name in data_args.datasets if not Path(name).exists()],
        "tags": ["visualchat", "multi-image", "multi-modal-causal-attention"],
    }
    settings = {
        "mode": model_args.mode,
        "epochs": training_args.num_train_epochs if training_args.max_steps < 0 else None,
        "steps": training_args.max_steps if training_args.max_steps > 0 else None,
        "batch (all processes, accumulated)": training_args.train_batch_size
        * training_args.world_size
        * training_args.gradient_accumulation_steps,
        "learning rate": training_args.learning_rate,
        "… of the projector": training_args.projector_learning_rate,
        "… of the embedding": training_args.embedding_learning_rate,
        "… of LoRA": training_args.lora_learning_rate,
        "… of the images' numbers": training_args.number_learning_rate,
        "schedule": f"{training_args.lr_scheduler_type}, warm-up {training_args.warmup_steps}",
        "AdamW betas": f"{training_args.adam_beta1}, {training_args.adam_beta2}",
        "weight decay": training_args.weight_decay,
        "gradient clipping": training_args.max_grad_norm,
        "tokens of a conversation at most": data_args.max_length,
        "seed": training_args.seed,
    }
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", f"# {output_dir.name}", ""]
    lines += [
        f"A [DeepSpeed-VisualChat](https://arxiv.org/abs/2309.14327) model, trained from {' and '.join(base_models)}.",
        "",
    ]
    lines += ["## Measured", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value:g} |" for name, value in metrics.items() if isinstance(value, int | float)]
    if (output_dir / "curves.png").exists():
        shutil.copy(output_dir / "curves.png", folder / "curves.png")
        lines += ["", "![Loss and learning rate](curves.png)"]
    lines += ["", "## Data", "", table or "Streamed."]
    if (output_dir / "data.png").exists():
        shutil.copy(output_dir / "data.png", folder / "data.png")
        lines += ["", "![Tokens and images per example](data.png)"]
    lines += ["", "## Settings", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in settings.items() if value is not None]
    (folder / "README.md").write_text("\n".join(lines) + "\n")
