"""
Time to the first token, round by round, of a conversation that brings a picture in each round: a `ChatSession`, which
computes what is new, against running the whole conversation again from its pixel values.

The decoder has hidden 512 and 6 layers, the tower hidden 384 and 6 layers and makes 257 tokens of a picture; fp32.

    python -m benchmarks.chat_rounds
"""

import time

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast

from benchmarks.measure import compare
from benchmarks.report import RESULTS, write_results
from modeling_visualchat import VisualChatConfig, VisualChatForCausalLM, VisualChatProcessor


TEXT = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8}
VISION = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}
VISION |= {"image_size": 224, "patch_size": 14}
ROUNDS, REPEATS = 8, 3
QUESTION = "What has changed since the picture before?"


def make_model_and_processor(text: dict, vision: dict) -> tuple[VisualChatForCausalLM, VisualChatProcessor]:
    """Random weights, and a tokenizer of one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<unk>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    size = {"height": vision["image_size"], "width": vision["image_size"]}
    processor = VisualChatProcessor(CLIPImageProcessorPil(size=size, crop_size=size), tokenizer)

    torch.manual_seed(0)
    config = VisualChatConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=16384, eos_token_id=1, **text),
        image_token_id=processor.image_token_id,
        image_number_keys=True,
        image_number_token_ids=processor.image_number_token_ids(),
    )
    processor.image_seq_length = config.image_seq_length
    return VisualChatForCausalLM._from_config(config).eval().requires_grad_(False), processor


def measure_rounds(model, processor, rounds: int = ROUNDS, repeats: int = REPEATS) -> dict[str, list[list[float]]]:
    """
    Seconds to the first token of each round, `repeats` of each. The two sides take turns, and answer alike.
    """
    side = model.config.vision_config.image_size
    generator = np.random.default_rng(0)
    seconds = {"ours": [[] for _ in range(rounds)], "theirs": [[] for _ in range(rounds)]}
    settings = {"do_sample": False, "max_new_tokens": 1, "suppress_tokens": [0, 1, processor.image_token_id]}
    for repeat in range(repeats):
        session = model.start_chat(processor)  # with an image memory of its own: each picture is new
        for number in range(rounds):
            picture = Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8))
            question = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
            messages = [*session.messages, {"role": "user", "content": question}]

            def send(session=session, picture=picture):
                return session.send(QUESTION, picture, **settings)

            def run_again(messages=messages):
                inputs = processor.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
                )
                output = model.generate(**inputs, **settings)
                return processor.decode(output[0, inputs["input_ids"].shape[1] :])

            sides = {"ours": send, "theirs": run_again}
            answers = set()
            for name in list(sides)[:: -1 if (repeat + number) % 2 else 1]:
                start = time.perf_counter()
                answers.add(sides[name]())
                seconds[name][number].append(time.perf_counter() - start)
            assert len(answers) == 1, f"round {number + 1}: {answers}"
    return seconds


def to_results(seconds: dict[str, list[list[float]]]) -> list[dict]:
    """The last round of one side against the other's; and against the second round of its own, when all is warm."""
    ours, theirs = seconds["ours"], seconds["theirs"]
    last = f"round {len(ours)}"
    return [
        compare(f"first token in {last} of a chat, a picture in each, against the full re-run", ours[-1], theirs[-1]),
        compare(f"first token of a chat, {last} against round 2", ours[-1], ours[1]),
        compare(f"first token of the full re-run, {last} against round 2", theirs[-1], theirs[1]),
    ]


def draw_rounds(seconds: dict[str, list[list[float]]]) -> None:
    """Writes results/chat_rounds.png."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    for name, label, marker in (("theirs", "whole conversation again", "s"), ("ours", "ChatSession", "o")):
        numbers = range(1, len(seconds[name]) + 1)
        axis.plot(numbers, np.median(seconds[name], axis=1), marker=marker, label=label, color="black")
    axis.set(xlabel="round, with a picture in each", ylabel="seconds to the first token", ylim=(0, None))
    axis.legend(frameon=False)
    figure.savefig(RESULTS / "chat_rounds.png", dpi=110)
    plt.close(figure)


def main():
    torch.set_num_threads(1)  # what else runs on the machine costs a single thread the least
    seconds = measure_rounds(*make_model_and_processor(TEXT, VISION))
    print("| round | ChatSession | whole conversation again |\n|---|---|---|")
    for number, (ours, theirs) in enumerate(zip(seconds["ours"], seconds["theirs"]), 1):
        print(f"| {number} | {np.median(ours):.2f} s | {np.median(theirs):.2f} s |")
    write_results("chat_rounds", to_results(seconds))
    draw_rounds(seconds)


if __name__ == "__main__":
    main()
