"""
Says whether a change of the code changed a number: what one version of the code computes, against what another one does.

    python -m benchmarks.same_numbers record outputs/before   # with the code as it was
    python -m benchmarks.same_numbers compare outputs/before  # with the code as it is, exit status 1 if something differs

`record` saves tiny models of every variant with and without numbered keys, and what they compute in float64 on one thread:
logits, all gradients, shapes of caches, tokens of greedy and beam search. It also saves an image memory and a chat.
`compare` loads what was saved, with the code at hand and with the code in the folders, and computes all of it again.
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from modeling_visualchat import ChatSession, ImageMemory, VisualChatConfig, VisualChatForCausalLM, VisualChatProcessor


BOUND = 1e-12  # of the largest value of a tensor
IMAGE_SIZE, IMAGE_TOKENS = 16, 5
VARIANTS = {"mmca": (False, True), "mmca_merged": (False, True), "causal": (False, True), "mmca_released": (False,)}
# A run of two text tokens, an image
LAYOUTS = {"several images": ["titit", "tt", "iit"], "text": ["tttt", "tt"]}
GENERATION = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
RELOAD = """
import sys
sys.modules["modeling_visualchat"] = None
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
expected = torch.load(sys.argv[1] + "/expected.pt")
with torch.no_grad():
    assert torch.equal(model(**expected["inputs"]).logits, expected["logits"]), "other logits"
"""


def make_processor() -> VisualChatProcessor:
    """A token for each byte, and `<s>` and `</s>`."""
    vocabulary = {token: k for k, token in enumerate(["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "padding_side": "left"}
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessorPil(size=size, crop_size=size)
    return VisualChatProcessor(image_processor, PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special), IMAGE_TOKENS)


def make_model(processor: VisualChatProcessor, variant: str, numbered: bool) -> VisualChatForCausalLM:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=IMAGE_SIZE // 2,
        initializer_factor=5.0,
    )
    text = LlamaConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,
    )
    config = VisualChatConfig(
        vision_config=vision,
        text_config=text,
        multimodal_attention=variant,
        image_number_keys=numbered,
        image_number_token_ids=processor.image_number_token_ids(12) if numbered else None,
        image_token_id=processor.image_token_id,
    )
    return VisualChatForCausalLM(config).eval()


def make_inputs(layout: list[str], image_token_id: int, padding_side: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sequences = []
    for parts in layout:
        tokens = []
        for part in parts:
            text = torch.randint(3, 250, (2,), generator=generator).tolist()
            tokens += [image_token_id] * IMAGE_TOKENS if part == "i" else text
        sequences.append(tokens)
    length = max(map(len, sequences))
    pads = [(length - len(one), 0) if padding_side == "left" else (0, length - len(one)) for one in sequences]
    inputs = {
        "input_ids": torch.tensor([[0] * left + one + [0] * right for one, (left, right) in zip(sequences, pads)]),
        "attention_mask": torch.tensor(
            [[0] * left + [1] * len(one) + [0] * right for one, (left, right) in zip(sequences, pads)]
        ),
    }
    if images := sum(parts.count("i") for parts in layout):
        shape = (images, 3, IMAGE_SIZE, IMAGE_SIZE)
        inputs["pixel_values"] = torch.randn(shape, generator=generator, dtype=torch.float64)
    return inputs


def compute(model: VisualChatForCausalLM) -> Iterator[tuple[str, torch.Tensor]]:
    """What a model computes, by name."""
    remembers = model.config.multimodal_attention in ("mmca", "mmca_merged")
    for attention, (name, layout), side in itertools.product(("eager", "sdpa"), LAYOUTS.items(), ("left", "right")):
        model.set_attn_implementation({"text_config": attention, "vision_config": "sdpa"})
        inputs = make_inputs(layout, model.config.image_token_id, side)
        kept = inputs["attention_mask"].bool()
        where = f"{attention}, {name}, padded on the {side}: "
        labels = inputs["input_ids"].masked_fill(~kept | (inputs["input_ids"] == model.config.image_token_id), -100)
        model.zero_grad()
        outputs = model(**inputs, labels=labels, output_hidden_states=True, use_cache=False)
        outputs.loss.backward()
        yield where + "loss", outputs.loss.detach()
        yield where + "logits", outputs.logits.detach()[kept]
        yield where + "hidden states", torch.stack([states.detach()[kept] for states in outputs.hidden_states])
        for parameter, weight in model.named_parameters():
            if weight.grad is not None:
                yield f"{where}gradient of {parameter}", weight.grad.clone()
        if side == "left":
            with torch.no_grad():
                for answer, tokens in generate(model, inputs, attention):
                    yield where + answer, tokens
    if remembers:
        inputs = make_inputs(LAYOUTS["several images"], model.config.image_token_id, "left")
        memory = model.encode_images(inputs.pop("pixel_values"))
        yield "keys of the image memory", memory.keys
        yield "values of the image memory", memory.values
        with torch.no_grad():
            kept = (inputs["attention_mask"] == 1) & (inputs["input_ids"] != model.config.image_token_id)
            yield "logits by image memory", model(**inputs, image_memory=memory).logits[kept]
            yield "tokens by image memory", model.generate(**inputs, image_memory=memory, **GENERATION)


def generate(model: VisualChatForCausalLM, inputs: dict, attention: str) -> Iterator[tuple[str, torch.Tensor]]:
    cache = DynamicCache(config=model.config)
    yield "tokens of a dynamic cache", model.generate(**inputs, **GENERATION, past_key_values=cache)
    shapes = [[cache.get_seq_length(layer), *cache.layers[layer].keys.shape] for layer in range(3)]
    yield "shape of a dynamic cache", torch.tensor(shapes)
    yield "tokens of a static cache", model.generate(**inputs, **GENERATION, cache_implementation="static")
    yield "tokens of beams", model.generate(**inputs, **GENERATION, num_beams=3, num_return_sequences=2)
    if attention == "eager":  # kept in 4 bits, of float32
        model.float()
        pictures = {name: states.float() for name, states in inputs.items() if name == "pixel_values"}
        quantized = {"cache_implementation": "quantized", "cache_config": {"backend": "quanto", "nbits": 4}}
        yield "tokens of a quantized cache", model.generate(**{**inputs, **pictures}, **GENERATION, **quantized)
        model.double()


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def each_model(folder: Path) -> Iterator[tuple[str, Path, str, bool]]:
    for variant, choices in VARIANTS.items():
        for numbered in choices:
            name = f"{variant}-numbered" if numbered else variant
            yield name, folder / name, variant, numbered


def record(folder: Path) -> None:
    processor = make_processor()
    for name, place, variant, numbered in each_model(folder):
        print(f"{name} …", flush=True)
        model = make_model(processor, variant, numbered)
        model.save_pretrained(place)
        processor.save_pretrained(place)
        inputs = make_inputs(LAYOUTS["several images"], model.config.image_token_id, "left")
        inputs["pixel_values"] = inputs["pixel_values"].float()
        with torch.no_grad():
            torch.save({"inputs": inputs, "logits": model(**inputs).logits}, place / "expected.pt")
        if variant in ("mmca", "mmca_merged"):
            model.encode_images(inputs["pixel_values"]).save(place / "memory.safetensors")
        chat = model.start_chat(processor)
        answers = [chat.send(f"Question {k}?", images=[picture(k)], max_new_tokens=8) for k in range(2)]
        (place / "answers.json").write_text(json.dumps(answers))
        chat.save(place / "chat")
        keys = {"state_dict": sorted(model.state_dict()), "config": json.loads((place / "config.json").read_text())}
        (place / "names.json").write_text(json.dumps(keys))
        model.double()
        save_file({key: value.contiguous() for key, value in compute(model)}, place / "numbers.safetensors")


def compare(folder: Path) -> int:
    problems = []
    for name, place, variant, _ in each_model(folder):
        model, processor = AutoModel.from_pretrained(place), AutoProcessor.from_pretrained(place)
        names = json.loads((place / "names.json").read_text())
        if sorted(model.state_dict()) != names["state_dict"]:
            problems.append(f"{name}: the state dict has other keys")
        model.config.save_pretrained(place / "again")
        again = json.loads((place / "again" / "config.json").read_text())
        for field in sorted(again.keys() | names["config"].keys()):
            if again.get(field) != names["config"].get(field) and field not in ("dtype", "vision_config", "text_config"):
                problems.append(f"{name}: config.{field} was {names['config'].get(field)!r}, is {again.get(field)!r}")
        reload = subprocess.run([sys.executable, "-c", RELOAD, str(place)], capture_output=True, text=True, check=False)
        if reload.returncode:
            problems.append(f"{name}: the code in the folder: {reload.stderr.strip().splitlines()[-1]}")
        answers = json.loads((place / "answers.json").read_text())
        chat = ChatSession.load(place / "chat", model, processor)
        if [one.answer for one in chat.rounds] != answers or chat.edit(1, "Question 1?", max_new_tokens=8) != answers[1]:
            problems.append(f"{name}: the chat that was saved goes on otherwise")
        expected = torch.load(place / "expected.pt")
        with torch.no_grad():
            inputs = expected["inputs"]
            if not torch.equal(model(**inputs).logits, expected["logits"]):
                problems.append(f"{name}: other logits in float32")
            if variant in ("mmca", "mmca_merged"):
                inputs = {key: value for key, value in inputs.items() if key != "pixel_values"}
                model(**inputs, image_memory=ImageMemory.load(place / "memory.safetensors"))
        problems += compare_numbers(name, place, model.double())
    print("\n".join(problems) or "No number differs.")
    return 1 if problems else 0


def compare_numbers(name: str, place: Path, model: VisualChatForCausalLM) -> list[str]:
    before, problems, worst, equal = load_file(place / "numbers.safetensors"), [], 0.0, 0
    after = dict(compute(model))
    if missing := before.keys() ^ after.keys():
        problems.append(f"{name}: only one side has {', '.join(sorted(missing)[:5])}")
    for key in before.keys() & after.keys():
        old, new = before[key], after[key]
        if old.shape != new.shape or not old.is_floating_point():
            if not torch.equal(old, new):
                problems.append(f"{name}: {key} was {old.tolist()!s:.80}, is {new.tolist()!s:.80}")
            continue
        equal += torch.equal(old, new)
        difference = float((old - new).abs().max() / old.abs().max().clamp(min=1))
        worst = max(worst, difference)
        if difference > BOUND:
            problems.append(f"{name}: {key} differs by {difference:.1e}")
    print(
        f"{name}: {len(before)} results, of the tensors of numbers {equal} to the bit, the others within {worst:.1e}",
        flush=True,
    )
    return problems


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.exit(record(arguments.folder) if arguments.action == "record" else compare(arguments.folder))
