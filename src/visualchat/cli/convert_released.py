# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
r"""
Convert a checkpoint of DeepSpeed-VisualChat's own training script into a VisualChat folder:

    visualchat convert released epoch-5/pytorch_model.bin --config sub_configs.json --tokenizer epoch-5 \
        --output outputs/converted

That script saves no configuration. The JSON file holds what it was run with:

    {"projector": "baseline", "vision_config": {…}, "text_config": {…}, "image_token_id": 32001, "base_vocab_size": 32000}

projector is its --vis_proj (baseline, vit or perceiver). vision_config and text_config are those of the two models, with the
vocabulary that was trained: base_vocab_size tokens, "### Image:", "<image>" and perhaps one for padding.
"""

import argparse
from pathlib import Path

from visualchat.cli.options import make_parser


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = make_parser("convert released", __doc__)
    parser.add_argument("model", metavar="MODEL", type=Path, help="pytorch_model.bin of the training script")
    parser.add_argument("--config", type=Path, required=True, help="JSON file with what it was run with")
    parser.add_argument("--tokenizer", help="folder or Hub id: what the training script saved, or the decoder's own")
    parser.add_argument(
        "--attention",
        choices=["mmca_released", "mmca", "causal"],
        default="mmca_released",
        help="mmca_released (the default): as the checkpoint was trained with --enable_mmca_attention; causal: as without"
        " it, but with the images of each example to be given in reverse; mmca: the paper's, to be fine-tuned",
    )
    parser.add_argument("--lora", choices=["fused", "unfused"], help="where the checkpoint holds LoRA factors")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    from visualchat.conversion.released import run

    run(args)
