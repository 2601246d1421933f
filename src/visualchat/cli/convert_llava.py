# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Start a VisualChat model from a LLaVA 1.5 folder, whose CLIP tower and LLaMA decoder have learned from images already:

    visualchat convert llava llava-hf/llava-1.5-7b-hf --output outputs/from_llava

The tower, the decoder, the vocabulary and the choice of features are LLaVA's. With --projector mlp the projector and the
prompt are too, and with --attention causal the model computes LLaVA's logits. Of LLaVA's projector, the others use the first
layer at most, and their prompt is VisualChat's: train the projector before use (`visualchat train --model_name_or_path
outputs/from_llava …`).
"""

import argparse
from pathlib import Path

from visualchat.cli.options import make_parser


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = make_parser("convert llava", __doc__)
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of the LLaVA model")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument(
        "--attention",
        choices=["mmca", "mmca_merged", "causal"],
        default="mmca",
        help="of the new model (default %(default)s)",
    )
    parser.add_argument(
        "--projector",
        choices=["linear", "mlp", "vit", "perceiver"],
        default="linear",
        help="of the new model (default %(default)s)",
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    from visualchat.conversion.llava import run

    run(args)
