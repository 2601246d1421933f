# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Answer questions with one model or several, and score the answers where the true ones are known:

    visualchat evaluate outputs/demo/model --conversations eval.json
    visualchat evaluate outputs/demo/model --labelled examples.parquet --max-new-tokens 8
    visualchat evaluate outputs/demo/model outputs/lora/model --labelled examples.parquet

MODEL is a folder or Hub id of a VisualChat model, or of a PEFT adapter of one. Several models are compared in one report.
The folder --output then holds report.html, with the images inside, results.json, and a folder for each model. That has
answers.jsonl; for conversations also answers.csv (test_name, image_path, question, answer), and for labelled datasets
losses.jsonl. Run the command again to resume an evaluation that was killed: it keeps all answers and tries again what
failed.

The exit status is 0 if every question was answered, 1 if some were not (each such dialogue is named), and 2 if nothing
could be done.
"""

import argparse
from pathlib import Path

from visualchat.cli.options import add_device, add_dtype, add_model, make_parser


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = make_parser("evaluate", __doc__)
    add_model(
        parser,
        help="folders or Hub ids of VisualChat models or adapters; the others are compared with the first",
        nargs="+",
    )
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--conversations", type=Path, help="JSON: name → rounds [question] or [question, 'path path …']")
    data.add_argument("--labelled", nargs="+", help="datasets of messages and images, as for `visualchat train`")
    parser.add_argument("--output", type=Path, default=Path("outputs/evaluation"), help="folder (default %(default)s)")
    parser.add_argument("--image-root", type=Path, help="where paths of --conversations begin; by default the JSON's folder")
    parser.add_argument("--batch-size", type=int, default=8, help="dialogues answered at once (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of an answer, at most (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0, the default, takes the likeliest")
    parser.add_argument("--top-p", type=float, default=1.0, help="of sampling (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling and confidence intervals (default %(default)s)")
    add_dtype(parser)
    add_device(parser)
    parser.add_argument("--report-limit", type=int, default=200, help="dialogues in the report (default %(default)s)")
    args = parser.parse_args(argv)
    for name, least in (("batch_size", 1), ("max_new_tokens", 1), ("temperature", 0), ("report_limit", 0), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be {least} at least, got {getattr(args, name)}")
    if args.labelled and args.image_root:
        parser.error("--image-root is for --conversations: paths of --labelled begin in the current folder")
    return args


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    from visualchat.evaluation.evaluate import run

    return run(args)
