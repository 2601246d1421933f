"""
The time to the first token in each round of a conversation with a new image per round: a `ChatSession`, which computes only
what is new, against a prefill of the whole conversation from its pixel values.

The decoder has 6 layers of hidden size 512, the vision tower 6 layers of hidden size 384. An image has 257 tokens. All in
fp32.

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
QUESTION = "What has changed since the previous image?"


def make_model_and_processor(text: dict, vision: dict) -> tuple[VisualChatForCausalLM, VisualChatProcessor]:
    """A model with random weights, and a processor whose tokenizer has one token per byte."""
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
    Seconds to the first token of each round, with `repeats` measurements per round. The two sides take turns, and their
    answers must be the same.
    """
    side = model.config.vision_config.image_size
    generator = np.random.default_rng(0)
    seconds = {"ours": [[] for _ in range(rounds)], "theirs": [[] for _ in range(rounds)]}
    settings = {"do_sample": False, "max_new_tokens": 1, "suppress_tokens": [0, 1, processor.image_token_id]}
    for repeat in range(repeats):
        session = model.start_chat(processor)  # with its own image memory, so that each image is new
        for number in range(rounds):
            image = Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8))
            question = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
            messages = [*session.messages, {"role": "user", "content": question}]

            def send(session=session, image=image):
                return session.send(QUESTION, image, **settings)

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
    """The last round of our side against theirs, and of each side against its own second round."""
    ours, theirs = seconds["ours"], seconds["theirs"]
    last = f"round {len(ours)}"
    return [
        compare(f"first token in {last} of a chat, an image in each, against the full re-run", ours[-1], theirs[-1]),
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
    axis.set(xlabel="round, with an image in each", ylabel="seconds to the first token", ylim=(0, None))
    axis.legend(frameon=False)
    figure.savefig(RESULTS / "chat_rounds.png", dpi=110)
    plt.close(figure)


def main():
    torch.set_num_threads(1)  # a single thread is disturbed least by other processes
    seconds = measure_rounds(*make_model_and_processor(TEXT, VISION))
    print("| round | ChatSession | whole conversation again |\n|---|---|---|")
    for number, (ours, theirs) in enumerate(zip(seconds["ours"], seconds["theirs"]), 1):
        print(f"| {number} | {np.median(ours):.2f} s | {np.median(theirs):.2f} s |")
    write_results("chat_rounds", to_results(seconds))
    draw_rounds(seconds)


if __name__ == "__main__":
    main()
