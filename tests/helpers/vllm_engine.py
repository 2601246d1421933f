"""Conversations answered by vLLM with the plugin, and by `model.generate`."""

from pathlib import Path
from typing import NamedTuple

import torch
from vllm import LLM, SamplingParams

from benchmarks.vllm_parity import answer, in_openai_form
from helpers.tiny import assistant, digit_image, make_image_processor, make_model, make_tokenizer, user
from modeling_visualchat import VisualChatForCausalLM, VisualChatProcessor


NEW_TOKENS = 12
# The kernels of vLLM for CPUs take heads of 32 and more
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}


class Answer(NamedTuple):
    """The token ids of an answer, and the log-probability of each."""

    tokens: list[int]
    logprobs: torch.Tensor


def save_model(folder: Path, **overrides) -> VisualChatProcessor:
    """A tiny model and its processor, which is returned."""
    if overrides.get("projector") == "perceiver":
        overrides.setdefault("num_query_tokens", 4)
    text = {**HEADS, **overrides.pop("text", {})}
    model = make_model(text={name: value for name, value in text.items() if value is not None}, **overrides)
    image_processor = make_image_processor(overrides.get("tower", "clip"))
    processor = VisualChatProcessor(image_processor, make_tokenizer(), image_seq_length=model.config.image_seq_length)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return processor


def list_conversations() -> list[list[dict]]:
    """Of zero to five images and one to three rounds; images repeat, and come between rounds."""
    a, b, c, d = map(digit_image, range(4))
    asked = "what is the difference between image"
    return [
        [user("what is this?")],
        [user("what is this?", a)],
        [user(f"{asked} 1 and image 2?", a, b)],
        [user("describe the image", a, b), assistant("a cute cat"), user("what is the difference?")],
        [user("describe image 1", a), assistant("cat"), user(f"{asked} 1 and 2?", c), assistant("no"), user("and this?", d)],
        [user("please describe"), assistant("black"), user("what is this?", d)],
        [user("what is image 2?", d, d)],
        [user("what is image 3?", c, d, a, b)],
        [user("what is image 5?", a, b, c, d, a)],
        [user("describe", a), assistant("a black cat"), user("describe", a), assistant("the same cat"), user("why?")],
        [user("please describe the image. " * 6, b), assistant("a cat. " * 9), user("what's the difference?", c)],
        [{"role": "system", "content": "You are a cat."}, user("what is this?", c, b)],
    ]


def answer_with_transformers(folder: Path, conversations: list[list[dict]], new_tokens: int = NEW_TOKENS) -> list[Answer]:
    """One conversation after the other, greedily, in float32."""
    model = VisualChatForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    processor = VisualChatProcessor.from_pretrained(folder)
    return [Answer(*answer(model, processor, one, new_tokens)) for one in conversations]


def start_engine(folder: Path, **options) -> LLM:
    """vLLM in float32, where prompts are cut into chunks of 16 tokens, and so are images."""
    settings = {
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 16,
        "enable_chunked_prefill": True,
        "enforce_eager": True,
        "limit_mm_per_prompt": {"image": 8},
        "seed": 0,
        "disable_log_stats": False,
    }
    return LLM(model=str(folder), **{**settings, **options})


def answer_with_vllm(engine: LLM, conversations: list[list[dict]], new_tokens: int = NEW_TOKENS, **options) -> list[Answer]:
    """All conversations at once, as OpenAI's clients send them."""
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, logprobs=0)
    outputs = engine.chat([with_data_urls(one) for one in conversations], sampling, use_tqdm=False, **options)
    answers = []
    for output in (output.outputs[0] for output in outputs):
        logprobs = [step[token].logprob for token, step in zip(output.token_ids, output.logprobs)]
        answers.append(Answer(list(output.token_ids), torch.tensor(logprobs)))
    return answers


def with_data_urls(conversation: list[dict]) -> list[dict]:
    return [
        one if isinstance(one["content"], str) else {**one, "content": list(map(in_openai_form, one["content"]))}
        for one in conversation
    ]
