"""
Makes what `recipes/tiny.yaml` trains, without any download: a random CLIP tower, a random LLaMA and conversations over
scikit-learn's digits, in the schema of all training data.

    python -m examples.digits_demo.make_tiny --output outputs/tiny
    visualchat train examples/recipes/tiny.yaml
"""

import argparse
from pathlib import Path

import datasets

from examples.digits_demo.stages import make_decoder, make_processor, make_tower
from visualchat.data.digits import make_conversations, split_digits
from visualchat.data.shards import FEATURES


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/tiny"), help="folder to write")
    parser.add_argument("--rows", type=int, default=400, help="conversations")
    args = parser.parse_args(argv)
    conversations = make_conversations(split_digits()["train"], args.rows)
    processor = make_processor(conversations)
    make_tower().save_pretrained(args.output / "tower")
    processor.image_processor.save_pretrained(args.output / "tower")
    make_decoder(processor).save_pretrained(args.output / "decoder")
    processor.tokenizer.save_pretrained(args.output / "decoder")
    rows = [
        {
            "id": str(index),
            "source": "digits",
            "messages": [{"role": m["role"], "content": as_parts(m["content"])} for m in row["messages"]],
            "images": [image.convert("RGB") for image in row["images"]],
        }
        for index, row in enumerate(conversations)
    ]
    (args.output / "data").mkdir(exist_ok=True)
    datasets.Dataset.from_list(rows, features=FEATURES).to_parquet(args.output / "data" / "shard-00000-of-00001.parquet")


def as_parts(content: str | list[dict]) -> list[dict]:
    """Tables hold every message's content as a list of parts."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [{"type": part["type"], "text": part.get("text")} for part in content]


if __name__ == "__main__":
    main()
