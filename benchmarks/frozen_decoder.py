"""
What a frozen decoder understands of an image token under each attention, without any training: the token is the mean of the
embeddings of a thing's name, as an ideal projector would make it, and the decoder is asked what the image shows.

    python -m examples.pictures.parts
    python -m benchmarks.frozen_decoder

For each attention it prints two things. `names` is the share of things whose name the decoder would write: each token of the
name is the likeliest after those before it. `norm` is the norm of the image token's hidden state after two thirds of the
layers, in multiples of that of the other tokens (medians). `--decoder` takes any decoder with a chat template.
"""

import argparse
import json
from random import Random

import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionConfig, CLIPVisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from benchmarks.report import save_results
from examples.pictures.kinds import Kind, list_kinds
from modeling_visualchat import VisualChatForCausalLM, VisualChatProcessor


MERGED = {"multimodal_attention": "mmca_merged"}
# The tower is never used: an image is one token, which is given
TOWER = CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", default="outputs/parts/decoder", help="folder or Hub id (default %(default)s)")
    parser.add_argument("--prefix", help="the image prefix, a text (default: how a conversation with the decoder begins)")
    parser.add_argument("--step", type=int, default=8, help="asks about every so many kinds of things (default %(default)s)")
    args = parser.parse_args()
    decoder = AutoModelForCausalLM.from_pretrained(args.decoder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.decoder)
    processor = VisualChatProcessor(CLIPImageProcessorPil(), tokenizer, image_seq_length=1, chat_format="decoder")
    prefix_ids = processor.image_prefix_ids()
    if args.prefix is not None:
        prefix_ids = tokenizer(args.prefix, add_special_tokens=False)["input_ids"]
    prefix = {"image_prefix_ids": prefix_ids}
    numbers = {"image_number_keys": True, "image_number_token_ids": processor.image_number_token_ids()}
    settings = {
        "causal attention": {"multimodal_attention": "causal"},
        "MMCA, merged": MERGED,
        "MMCA, merged, image prefix": {**MERGED, **prefix},
        "MMCA, merged, image prefix, numbered image keys": {**MERGED, **prefix, **numbers},
    }
    kinds, results = list_kinds()[:: args.step], []
    for name, fields in settings.items():
        model = VisualChatForCausalLM.from_vision_text_pretrained(
            CLIPVisionModel(TOWER),
            decoder,
            projector="perceiver",
            num_query_tokens=1,
            image_token_id=processor.image_token_id,
            **fields,
        )
        names = {images: measure_names(model, processor, kinds, images) for images in (1, 3)}
        results.append(
            {
                "attention": name,
                "decoder": args.decoder,
                "prefix": tokenizer.decode(prefix_ids),
                "kinds": len(kinds),
                "norm": measure_norm(model, processor, kinds[:20]),
                "names of one image": names[1],
                "names of one of three images": names[3],
            }
        )
        print(json.dumps(results[-1], indent=1), flush=True)
    save_results("frozen_decoder", results)


@torch.inference_mode()
def measure_names(model: VisualChatForCausalLM, processor: VisualChatProcessor, kinds: list[Kind], images: int) -> float:
    """The share of kinds that are named, each among others if there are several images."""
    rng, right = Random(0), 0
    for kind in kinds:
        shown = rng.sample([other for other in kinds if other is not kind], images - 1)
        number = rng.randint(1, images)
        shown.insert(number - 1, kind)
        question = "What is this?" if images == 1 else f"What is in image {number}?"
        before, name = f"{kind.phrase.removesuffix(kind.name).capitalize()}", kind.name
        ids, spans = encode(processor, shown, question, f"{before}{name}.", len(before) - 1, len(before) + len(name))
        predicted = model(ids, mm_encoder_outputs=embed(model, processor, shown)).logits[0, :-1].argmax(-1)
        is_name = torch.tensor(spans[1:])
        right += bool((predicted[is_name] == ids[0, 1:][is_name]).all())
    return round(right / len(kinds), 3)


@torch.inference_mode()
def measure_norm(model: VisualChatForCausalLM, processor: VisualChatProcessor, kinds: list[Kind]) -> float:
    """The norm of an image token's hidden state in multiples of that of the other tokens but the first."""
    ratios = []
    for kind in kinds:
        ids, _ = encode(processor, [kind], "What is this?", "", 0, 0)
        outputs = model(ids, mm_encoder_outputs=embed(model, processor, [kind]), output_hidden_states=True)
        states = outputs.hidden_states[2 * len(outputs.hidden_states) // 3][0].norm(dim=-1)
        is_image = ids[0] == model.config.image_token_id
        ratios.append(states[is_image].mean() / states[1:][~is_image[1:]].median())
    return round(torch.stack(ratios).median().item(), 1)


def encode(
    processor: VisualChatProcessor, shown: list[Kind], question: str, answer: str, start: int, end: int
) -> tuple[torch.Tensor, list[bool]]:
    """The ids of a prompt and its answer, and which of them make the characters from `start` to `end` of the answer."""
    blank = {"type": "image", "image": Image.new("RGB", (32, 32))}
    messages = [{"role": "user", "content": [*[blank] * len(shown), {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    encoded = processor.encode_prompts([prompt + answer])
    within = [begin >= len(prompt) + start and stop <= len(prompt) + end for begin, stop in encoded["offset_mapping"][0]]
    return torch.tensor(encoded["input_ids"][0])[None], within


def embed(
    model: VisualChatForCausalLM, processor: VisualChatProcessor, shown: list[Kind]
) -> dict[str, BaseModelOutputWithPooling]:
    """Each thing as an image of one token: the mean of the embeddings of its name."""
    embedding = model.get_input_embeddings()
    names = [torch.tensor(processor.tokenizer(f" {kind.name}", add_special_tokens=False)["input_ids"]) for kind in shown]
    return {"image": BaseModelOutputWithPooling(pooler_output=[embedding(name).mean(0, keepdim=True) for name in names])}


if __name__ == "__main__":
    main()
