"""
Whether vLLM with the plugin gives the tokens of `model.generate`, in float32: 100 conversations about the digits of the
demo's test, of one to four images and one to four rounds, in one batch. Prompts are cut into chunks of 16 tokens, and so are
images.

    make demo && make test-vllm
    .venv/bin/python -m benchmarks.vllm_parity ask         # what generate answers, to outputs/vllm_parity.json
    .venv-vllm/bin/python -m benchmarks.vllm_parity check  # what vLLM answers, compared
"""

import argparse
import base64
import io
import json
import os
from pathlib import Path

import torch

from modeling_visualchat import VisualChatForCausalLM, VisualChatProcessor
from modeling_visualchat.messages_visualchat import fill_images
from visualchat.data.digits import make_conversations, split_digits


NEW_TOKENS, TOLERANCE = 16, 1e-3


def list_prompts(count: int) -> list[list[dict]]:
    """The messages before the last answer of conversations of the demo's test, with images as data URLs."""
    prompts = []
    for example in make_conversations(split_digits(0)["test"], count, seed=0):
        messages = fill_images(example, "example")[:-1]
        for message in messages:
            if not isinstance(message["content"], str):
                message["content"] = [in_openai_form(part) for part in message["content"]]
        prompts.append(messages)
    return prompts


def in_openai_form(part: dict) -> dict:
    """A part of a message, with its image as a data URL."""
    if part["type"] == "text":
        return part
    buffer = io.BytesIO()
    part["image"].convert("RGB").save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def answer(
    model: VisualChatForCausalLM, processor: VisualChatProcessor, prompt: list[dict], new_tokens: int
) -> tuple[list[int], torch.Tensor]:
    """The tokens of a greedy answer, and the log-probability of each."""
    chat = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(prompt, **chat)
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "return_dict_in_generate": True}
    generated = model.generate(**inputs, **settings, output_scores=True)
    tokens = generated.sequences[0, inputs["input_ids"].shape[1] :]
    return tokens.tolist(), torch.cat(generated.scores).log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def ask(folder: str, count: int, path: Path) -> None:
    """Writes the prompts, and the tokens of `generate` with their log-probabilities."""
    model = VisualChatForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    processor = VisualChatProcessor.from_pretrained(folder)
    rows = []
    for prompt in list_prompts(count):
        tokens, logprobs = answer(model, processor, prompt, NEW_TOKENS)
        rows.append({"prompt": prompt, "tokens": tokens, "logprobs": logprobs.tolist()})
    path.write_text(json.dumps(rows))
    print(f"{len(rows)} conversations, {sum(len(row['tokens']) for row in rows)} tokens of answers: {path}")


def check(folder: str, path: Path) -> None:
    """
    Raises:
        SystemExit: If a token differs, or a log-probability by more than `TOLERANCE`.
    """
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    rows = json.loads(path.read_text())
    engine = LLM(
        model=folder,
        dtype="float32",
        max_num_seqs=16,
        max_num_batched_tokens=16,
        enable_chunked_prefill=True,
        enforce_eager=True,
        limit_mm_per_prompt={"image": 4},
    )
    outputs = engine.chat([row["prompt"] for row in rows], SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=0))
    different, largest = 0, 0.0
    for row, output in zip(rows, (output.outputs[0] for output in outputs)):
        different += list(output.token_ids) != row["tokens"]
        given = [step[token].logprob for token, step in zip(output.token_ids, output.logprobs)]
        largest = max([largest, *(abs(one - other) for one, other in zip(given, row["logprobs"]))])
    print(f"{len(rows) - different} of {len(rows)} answers equal; log-probabilities differ by at most {largest:.1e}")
    if different or largest > TOLERANCE:
        raise SystemExit(1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("ask", "check"))
    parser.add_argument("--model", default="outputs/demo/model", help="folder; default %(default)s")
    parser.add_argument("--conversations", type=int, default=100, help="default %(default)s")
    parser.add_argument("--answers", type=Path, default=Path("outputs/vllm_parity.json"), help="default %(default)s")
    args = parser.parse_args(argv)
    if args.step == "ask":
        ask(args.model, args.conversations, args.answers)
    else:
        check(args.model, args.answers)


if __name__ == "__main__":
    main()
