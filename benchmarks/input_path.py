"""
Samples per second of the full input path (decode, resize, crop, normalize, template, tokenize, pad, label) against decoding
and resizing with PIL alone, in one process, interleaved.

    python -m benchmarks.input_path
"""

import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from benchmarks.report import write_results
from modeling_visualchat import VisualChatDataCollator, VisualChatProcessor


SAMPLES, BATCH, REPEATS, TARGET = 64, 8, 21, 0.9
ANSWER = "A building with a curved roof stands between trees, and people walk along the path in front of it. " * 2


def make_rows(folder: Path) -> list[dict]:
    """Conversations of two rounds over two photographs of 640×427 pixels, as JPEG files."""
    paths = []
    for index, photograph in enumerate(load_sample_images().images):
        paths.append(str(folder / f"{index}.jpg"))
        Image.fromarray(photograph).save(paths[-1], quality=90)
    image, text = {"type": "image"}, {"type": "text", "text": "What is in this picture, and where was it taken?"}
    turn = [{"role": "user", "content": [image, text]}, {"role": "assistant", "content": ANSWER}]
    images = [{"bytes": None, "path": path} for path in paths]
    return [{"source": "photographs", "messages": turn * 2, "images": images} for _ in range(SAMPLES)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 500 tokens, trained on the answer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=["<unk>", "</s>"])
    tokenizer.train_from_iterator([ANSWER], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def decode_and_resize(rows: list[dict]) -> None:
    for row in rows:
        for image in row["images"]:
            Image.open(image["path"]).convert("RGB").resize((336, 224), Image.Resampling.BICUBIC)


def main():
    torch.set_num_threads(1)
    processor = VisualChatProcessor(CLIPImageProcessorPil(), make_tokenizer(), image_seq_length=257)
    collate = VisualChatDataCollator(processor, pad_to_multiple_of=8, supervised_logits_only=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = make_rows(Path(folder))
        collate(rows[:BATCH])
        seconds = {"full": [], "pil": []}
        for _ in range(REPEATS):
            start = time.perf_counter()
            for k in range(0, SAMPLES, BATCH):
                collate(rows[k : k + BATCH])
            seconds["full"].append(time.perf_counter() - start)
            start = time.perf_counter()
            decode_and_resize(rows)
            seconds["pil"].append(time.perf_counter() - start)
    ratio = median(pil / full for pil, full in zip(seconds["pil"], seconds["full"]))
    print(f"full input path: {SAMPLES / median(seconds['full']):.1f} samples/s, two images each")
    print(f"PIL alone:       {SAMPLES / median(seconds['pil']):.1f} samples/s")
    claim = "samples/s of the input path against PIL decoding and resizing alone"
    write_results("input_path", [{"claim": claim, "ratio": round(ratio, 3), "target": TARGET}])


if __name__ == "__main__":
    main()
