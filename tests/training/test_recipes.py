"""The shipped recipes: their fields, the batch of the paper, and the memory that the README gives."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModel

from examples.digits_demo import make_tiny
from helpers.tiny import make_config
from modeling_visualchat import VisualChatForCausalLM
from visualchat.training.train import main, parse_arguments
from visualchat.training.trainer import VisualChatTrainingArguments


ROOT = Path(__file__).parents[2]


# hidden, intermediate, layers, heads, key-value heads of LLaMA-2
LLAMA_2 = {
    "7b": (4096, 11008, 32, 32, 32),
    "13b": (5120, 13824, 40, 40, 40),
    "70b": (8192, 28672, 80, 64, 8),
}


def make_paper_model(size: str):
    """The model of recipes/paper-*.yaml, without memory for its weights."""
    hidden, intermediate, layers, heads, key_value_heads = LLAMA_2[size]
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {
        "vocab_size": 32001,  # LLaMA-2's and the image token
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
    }
    config = make_config(image_token_id=32000, vision={**vision, "image_size": 224, "patch_size": 14}, text=text)
    with torch.device("meta"):
        model = VisualChatForCausalLM._from_config(config)
    model.freeze_for_alignment()
    return model


@pytest.mark.parametrize("size", sorted(LLAMA_2))
def test_the_papers_recipes_fill_their_deepspeed_json_and_reach_the_batch_they_name(size, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = Path(f"examples/recipes/paper-{size}.yaml")
    batch, processes = map(int, re.search(r"batch (\d+) on (\d+) GPUs", recipe.read_text()).groups())
    command = re.search(r"# +torchrun (.*) examples/train.py (\S+)", recipe.read_text())
    assert command.group(2) == str(recipe)
    counts = re.findall(r"--(?:nnodes|nproc_per_node) (\d+)", command.group(1))
    assert math.prod(map(int, counts)) == processes

    model = make_paper_model(size)  # before the arguments, after which ZeRO-3 shares out what is made
    monkeypatch.setattr(VisualChatTrainingArguments, "world_size", processes)
    words = ["--use_cpu", "--bf16", "False", "--output_dir", str(tmp_path)]
    _, _, training_args = parse_arguments([str(recipe), *words])
    assert f"LLaMA-2-{size.upper()}" in recipe.read_text()
    filled = training_args.hf_deepspeed_config
    filled.trainer_config_finalize(training_args, model, num_training_steps=1000)
    assert "auto" not in json.dumps(filled.config)
    assert filled.config["train_batch_size"] == batch == 128
    zero = filled.config["zero_optimization"]
    if zero["stage"] == 3:
        hidden = LLAMA_2[size][0]
        assert (zero["reduce_bucket_size"], zero["stage3_prefetch_bucket_size"]) == (hidden**2, int(0.9 * hidden**2))


def test_the_readmes_arithmetic_of_memory():
    """Bytes under bf16 and Adam: 2 for a weight, and 2 + 12 more if it trains (ZeRO, arXiv 1910.02054, section 3.1)."""
    columns = []
    for size, (hidden, _, layers, _, _) in LLAMA_2.items():
        model = make_paper_model(size)
        total = sum(parameter.numel() for parameter in model.parameters())
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        recipe = yaml.safe_load((ROOT / "examples" / "recipes" / f"paper-{size}.yaml").read_text())
        micro, accumulation = recipe["per_device_train_batch_size"], recipe["gradient_accumulation_steps"]
        gpus = 128 // (micro * accumulation)
        name = Path(recipe["deepspeed"]).stem
        weights = 2 * total / (gpus if name == "zero3" else 1)  # ZeRO-2 shares out the rest alone
        assert recipe["gradient_checkpointing"]
        columns.append(
            {
                "parameters, all · trained in `alignment`": f"{total / 1e9:.2f} · {trained / 1e9:.2f} billion",
                "DeepSpeed JSON": f"`{name}.json`",
                "micro-batch × accumulation × GPUs": f"{micro} × {accumulation} × {gpus}",
                "GB a GPU: `alignment` · `full`": (
                    f"{(weights + 14 * trained / gpus) / 1e9:.1f} · {(weights + 14 * total / gpus) / 1e9:.1f}"
                ),
                "GB a row of 4,096 tokens keeps (its layers' inputs)": f"{2 * 4096 * hidden * layers / 1e9:.1f}",
                "million parameters in `reduce` · `prefetch` buckets, by `auto`": (
                    f"{hidden**2 / 1e6:.0f} · {0.9 * hidden**2 / 1e6:.0f}" if name == "zero3" else "500 (default) · –"
                ),
                "GB of the host that gathers weights on save": f"{2 * total / 1e9:.0f}" if name == "zero3" else "–",
            }
        )
    readme = (ROOT / "README.md").read_text()
    for key in columns[0]:
        assert f"| {' | '.join([key, *(column[key] for column in columns)])} |" in readme


def test_recipes_are_read_and_their_fields_known(parts, tmp_path):
    for recipe in sorted((ROOT / "examples" / "recipes").glob("*.yaml")):
        model_args, data_args, training_args = parse_arguments(
            [str(recipe), "--use_cpu", "--bf16", "False", "--fp16", "False", "--output_dir", str(tmp_path), "--seed", "7"]
        )
        assert training_args.seed == 7
        assert model_args.mode in ("alignment", "lora", "full")
        assert data_args.datasets
    (tmp_path / "wrong.yaml").write_text("learning_rat: 1\n")
    with pytest.raises(ValueError, match=r"wrong\.yaml: unknown fields learning_rat"):
        parse_arguments([str(tmp_path / "wrong.yaml")])


def test_the_tiny_recipe_runs_as_the_readme_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_tiny.main(["--rows", "40"])
    words = [str(ROOT / "examples" / "recipes" / "tiny.yaml"), "--per_device_train_batch_size", "4"]
    metrics = main([*words, "--max_steps", "4", "--eval_steps", "2", "--save_steps", "2", "--generation_samples", "2"])
    assert {"eval_loss", "eval_exact_answers"} <= set(metrics)
    assert list(Path("outputs/tiny/run").glob("**/events.out.tfevents.*"))
    assert AutoModel.from_pretrained("outputs/tiny/run/model").config.image_number_keys
