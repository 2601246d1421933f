"""Every folder of `hub_configs/` is what its script writes, loads, has the parameters of its parts, and tells the truth."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from helpers.tiny import digit_image, make_model, make_processor, user
from modeling_visualchat import VisualChatForCausalLM
from modeling_visualchat.chat_template_visualchat import CHAT_TEMPLATE, OPENING, OPENING_WITH_BLANK
from visualchat.hub.configs import main


ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "hub_configs"
NAMES = ["tiny", "7b", "13b", "70b", "7b-448"]
CLIP = 303_179_776  # ViT-L/14 at 224 pixels
HIDDEN_SIZE = {"tiny": 64, "7b": 4096, "13b": 5120, "70b": 8192, "7b-448": 4096}
IMAGE_TOKENS = {"tiny": 5, "7b": 257, "13b": 257, "70b": 257, "7b-448": 256}
TOWER = {"7b": CLIP, "13b": CLIP, "70b": CLIP, "7b-448": CLIP + (32 * 32 - 16 * 16) * 1024}  # with the added positions
DECODER = {"7b": 6_738_415_616, "13b": 13_015_864_320, "70b": 68_976_648_192, "7b-448": 6_738_415_616}
KEY_SIZE = {
    "tiny": (2, 2 * 16),
    "7b": (32, 4096),
    "13b": (40, 5120),
    "70b": (80, 8 * 128),
    "7b-448": (32, 4096),
}  # layers, width


def build(name: str) -> VisualChatForCausalLM:
    with torch.device("meta"):
        return AutoModel.from_config(AutoConfig.from_pretrained(CONFIGS / name))


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def read_card(name: str) -> tuple[dict, dict[str, str], str]:
    """The front matter, the table, and the whole text."""
    text = (CONFIGS / name / "README.md").read_text()
    rows = re.findall(r"^\| (\S.*?) \| (.*?) \|$", text, flags=re.MULTILINE)
    return yaml.safe_load(text.split("---")[1]), dict(rows), text


def test_there_is_no_other_folder():
    assert {path.name for path in CONFIGS.iterdir()} == set(NAMES)


def test_the_folders_are_what_the_script_writes(tmp_path):
    main(["--output", str(tmp_path)])
    written = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {path.relative_to(CONFIGS) for path in CONFIGS.rglob("*") if path.is_file()}
    for path in written:
        texts = [(folder / path).read_text() for folder in (tmp_path, CONFIGS)]
        fresh, committed = (re.sub(r'"transformers_version": ".*?"', "", text) for text in texts)
        assert committed == fresh, f"hub_configs/{path} is outdated: run python -m visualchat.hub.configs"


@pytest.mark.parametrize("name", NAMES)
def test_it_is_a_repository_less_weights_and_code(name, tmp_path):
    make_model().save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    expected = {path.name for path in tmp_path.iterdir() if path.suffix not in (".py", ".safetensors")} | {"README.md"}
    if name != "tiny":  # LLaMA-2's tokenizer is licensed
        expected -= {"tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (CONFIGS / name).iterdir()} == expected
    template = (CONFIGS / name / "chat_template.jinja").read_text()
    # LLaMA-2's tokenizer puts a blank before a text, but none behind `<s>`
    assert template == (CHAT_TEMPLATE if name == "tiny" else CHAT_TEMPLATE.replace(OPENING, OPENING_WITH_BLANK))


@pytest.mark.parametrize("name", NAMES)
def test_it_has_the_parameters_of_its_parts(name):
    model = build(name)
    assert type(model) is VisualChatForCausalLM and model.config.dtype == torch.bfloat16
    text = LlamaConfig(**{**model.config.text_config.to_dict(), "vocab_size": model.config.image_token_id})
    with torch.device("meta"):
        decoder = count(LlamaForCausalLM(text))
        tower = count(CLIPVisionModel(model.config.vision_config))
    assert count(model.model.vision_tower) == tower == TOWER.get(name, tower)
    assert decoder == DECODER.get(name, decoder)
    joined = count(model.model.language_model) + count(model.lm_head)
    assert joined == decoder + 2 * HIDDEN_SIZE[name]  # the placeholder's row in embedding and output layer
    assert count(model) == tower + count(model.model.multi_modal_projector) + joined
    assert model.config.text_config.vocab_size == model.config.image_token_id + 1
    generation = GenerationConfig.from_pretrained(CONFIGS / name)
    assert generation.suppress_tokens == [model.config.image_token_id]


@pytest.mark.parametrize("name", NAMES)
def test_the_auto_map_names_what_a_saved_folder_carries(name, tmp_path):
    make_model().save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    carried = {path.stem: path.read_text() for path in tmp_path.glob("*.py")}
    config = json.loads((CONFIGS / name / "config.json").read_text())["auto_map"]
    processor = json.loads((CONFIGS / name / "processor_config.json").read_text())["auto_map"]
    assert set(config) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"}
    assert set(processor) == {"AutoProcessor"}
    needed = set()
    for entry in [*config.values(), *processor.values()]:
        module, class_name = entry.split(".")
        assert re.search(rf"^class {class_name}\b", carried[module], flags=re.MULTILINE), entry
        new = {module}
        while new:
            needed |= new
            new = {one for k in new for one in re.findall(r"^\s*from \.(\w+) import", carried[k], re.MULTILINE)} - needed
    assert needed == set(carried)


@pytest.mark.parametrize("name", NAMES)
def test_the_processor_fits_the_model(name):
    config = AutoConfig.from_pretrained(CONFIGS / name)
    processor = json.loads((CONFIGS / name / "processor_config.json").read_text())
    assert processor["image_seq_length"] == config.image_seq_length == IMAGE_TOKENS[name]
    image_processor = CLIPImageProcessorPil.from_pretrained(CONFIGS / name)
    pixel_values = image_processor(digit_image(0), return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, config.vision_config.image_size, config.vision_config.image_size)


@pytest.mark.parametrize("name", NAMES)
def test_the_card_is_true(name):
    front, table, text = read_card(name)
    model, config = build(name), AutoConfig.from_pretrained(CONFIGS / name)
    projector, hidden_size = count(model.model.multi_modal_projector), HIDDEN_SIZE[name]
    layers, width = KEY_SIZE[name]
    tower = count(model.model.vision_tower)
    context = 2048 if name == "tiny" else 4096
    assert config.text_config.max_position_embeddings == context
    image_size = {"tiny": 28, "7b-448": 448}.get(name, 224)
    decoder = config.text_config
    expected = {
        "parameters": count(model),
        "… of the vision tower": tower,
        "… of the projector": projector,
        "… of the decoder": count(model) - tower - projector - 2 * hidden_size,
        "… of the placeholder token, in embedding and output layer": 2 * hidden_size,
        "… trained in alignment (`freeze_for_alignment`): projector and token embedding": projector
        + config.text_config.vocab_size * hidden_size,
        "bytes of the weights, bfloat16": 2 * count(model),
        "pixels of an image": f"{image_size} × {image_size}",
        "tokens of an image": IMAGE_TOKENS[name],
        "bytes of the image memory of an image (`model.image_memory_nbytes`), bfloat16": 2
        * layers
        * IMAGE_TOKENS[name]
        * width
        * 2,
        "tokens of the context": context,
        "images that fit into the context beside 512 text tokens": (context - 512) // IMAGE_TOKENS[name],
        "layers · heads · key-value heads of the decoder": (
            f"{decoder.num_hidden_layers} · {decoder.num_attention_heads} · {decoder.num_key_value_heads}"
        ),
    }
    assert table == {key: f"{value:,}" if isinstance(value, int) else value for key, value in expected.items()}
    if name == "70b":
        assert decoder.num_key_value_heads == 8
    assert "no weights and no code" in text
    assert front["library_name"] == "transformers" and front["pipeline_tag"] == "image-text-to-text"
    assert front["license"] == ("apache-2.0" if name == "tiny" else "llama2")
    assert ("LLAMA 2 Community License" in text) == (name != "tiny")
    if name != "tiny":
        size = name.split("-")[0]
        assert front["base_model"] == ["openai/clip-vit-large-patch14", f"meta-llama/Llama-2-{size}-hf"]


@pytest.mark.parametrize("name", NAMES)
def test_the_cards_code_makes_a_folder_that_talks(name, tmp_path, monkeypatch):
    """With a tiny tower and decoder in the place of the real ones."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hub_configs").symlink_to(CONFIGS)
    block = re.search(r"```python\n(.*?)```", read_card(name)[2], flags=re.DOTALL).group(1)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 14}
    text = {"vocab_size": 2, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokenizer = AutoProcessor.from_pretrained(CONFIGS / "tiny").tokenizer
    text["vocab_size"] = tokenizer.convert_tokens_to_ids("<image>")
    CLIPVisionModel(CLIPVisionConfig(**vision, image_size=224)).save_pretrained("tower")
    CLIPImageProcessorPil().save_pretrained("tower")
    LlamaForCausalLM(LlamaConfig(**text, max_position_embeddings=4096)).save_pretrained("decoder")
    tokenizer.save_pretrained("decoder")
    for base, folder in zip(read_card(name)[0].get("base_model", ()), ("tower", "decoder")):
        block = block.replace(f'"{base}"', f'"{folder}"')
    exec(compile(block, f"hub_configs/{name}/README.md", "exec"), {})

    folder = Path(f"outputs/visualchat-{name}")
    made, shipped = (json.loads((path / "config.json").read_text()) for path in (folder, CONFIGS / name))
    assert set(made) == set(shipped)
    for key in set(shipped) - {"vision_config", "text_config", "image_token_id", "dtype", "transformers_version"}:
        assert made[key] == shipped[key], key
    for part in ("vision_config", "text_config"):
        assert set(made[part]) >= set(shipped[part])
    assert {path.name for path in (CONFIGS / name).iterdir()} - {"README.md"} <= {path.name for path in folder.iterdir()}
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert model.config.image_seq_length == processor.image_seq_length == IMAGE_TOKENS[name]
    chat = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([user("What?", digit_image(0))], **chat)
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
