# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Check data for training, or make it of your own images with captions, or of the public datasets of the paper:

    visualchat prepare --list
    visualchat prepare --source captions --data-root my_images --output prepared
    visualchat prepare --source llava --data-root data --check
    visualchat prepare --source llava llava_dial --data-root data --output prepared
    visualchat prepare --dataset examples.jsonl --check --model openai/clip-vit-large-patch14-336
    visualchat prepare --dataset examples.jsonl --output prepared --skip-bad

--source captions reads metadata.jsonl or metadata.csv in DATA_ROOT, as in a Hub dataset of images: file_name (relative to
this file), the caption in text or caption, and optionally question (else one is drawn). The other sources are the paper's;
you download their raw files, and --list shows which ones each needs. --dataset names a dataset that has the columns messages
and images already, as for `visualchat train`. All texts are read and checked first. Then the images are decoded in parallel.
OUTPUT/NAME appears once every example is written. It holds parquet shards for
datasets.load_dataset("parquet", data_files="OUTPUT/NAME/*.parquet"), prepared.json with the settings and counts,
problems.jsonl with every problem, and a dataset card. Until then the work lies in OUTPUT/NAME.partial. Run the command again
to resume a run that was killed: it keeps all finished shards.

Found are: lines or entries of a JSON file that are no JSON object in UTF-8; fields that are missing, null or of the wrong
type; empty questions and answers; texts too long for a tokenizer; turns out of order, or without an answer; images that do
not match the image parts, or the placeholders in texts; ids that repeat (the first example without a fault is kept);
lines that repeat a caption of an image; references to unknown records; images that are missing, truncated, undecodable or
too thin. Each is named by file, example (from 0, or line, from 1) and field, and counted by kind. A file that cannot be read
at all ends the run with exit status 2.

--model names what is to be trained, a VisualChat model or its vision tower. It decides which images are too thin and how
many images a conversation may hold. By default it is a CLIP tower for 224 pixels.

If an example is bad, the run ends with exit status 1 and OUTPUT/NAME does not appear. Correct the data and run the
command again: only the shards with problems are made anew. Or pass --skip-bad: bad examples are dropped and counted. With
one seed the result is the same, whatever the number of processes.
"""

import argparse
import os
from pathlib import Path

from visualchat.cli.options import make_parser


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = make_parser("prepare", __doc__)
    parser.add_argument("--source", nargs="+", metavar="NAME", help="captions, or public datasets; see --list")
    parser.add_argument("--dataset", nargs="+", metavar="NAME", help="as --datasets of `visualchat train`")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="folder of the raw data")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder to write DIR/NAME to")
    parser.add_argument("--check", action="store_true", help="only look for problems; with --output, list them all there")
    parser.add_argument("--skip-bad", action="store_true", help="drop and count bad examples instead of stopping")
    parser.add_argument("--model", metavar="MODEL", help="what is to be trained: a VisualChat model or its vision tower")
    parser.add_argument(
        "--max-samples", type=int, metavar="N", help="at most N examples, drawn at random; all texts are read"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default %(default)s)")
    parser.add_argument(
        "--num-proc", type=int, default=os.cpu_count(), metavar="N", help="processes (default: the number of cores)"
    )
    parser.add_argument(
        "--rows-per-shard", type=int, default=1000, metavar="N", help="examples in one parquet file (default %(default)s)"
    )
    parser.add_argument("--embed-images", action="store_true", help="store the bytes of image files, not their paths")
    parser.add_argument("--overwrite", action="store_true", help="replace what a run with other settings left")
    parser.add_argument("--list", action="store_true", help="show the sources and the raw files that each needs")
    args = parser.parse_args(argv)
    if not args.list:
        needed = {"--source or --dataset": args.source or args.dataset}
        if args.source:
            needed["--data-root"] = args.data_root
        if not args.check:
            needed["--output"] = args.output
        if missing := [name for name, value in needed.items() if not value]:
            parser.error(f"{', '.join(missing)} missing (or use --list)")
    for name in ("max_samples", "num_proc", "rows_per_shard"):
        value = vars(args)[name]
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    return args


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    from visualchat.data.prepare import run

    return run(args)
