"""Merges a PEFT adapter into its base model: `visualchat merge`."""

import argparse

from visualchat.errors import input_errors
from visualchat.loading import load_merged, load_processor


def run(args: argparse.Namespace) -> None:
    """Merges with the options of `visualchat merge`."""
    with input_errors(f"cannot merge {args.model}: "):
        model = load_merged(args.model, args.base, args.trust_remote_code)
        processor = load_processor(args.model, args.trust_remote_code)
    model.save_pretrained(args.output)
    processor.save_pretrained(args.output)
