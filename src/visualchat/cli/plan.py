# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Does it fit? Predict the memory of each GPU, the largest micro-batch and the DeepSpeed JSON to use, before you rent a
machine. The model is built without weights, so a laptop plans 70B:

    visualchat plan hub_configs/13b --gpus 8 --gpu-memory 80 --mode full --batch 4 --images 3

Each row of the table is one DeepSpeed JSON of examples/deepspeed, with or without gradient checkpointing. It shows the
memory of a GPU at the peak of forward and backward, then at the peak of the optimizer's step. GB are 10⁹ bytes.

--reserve is kept free for what is not computed: the CUDA context, NCCL's buffers, fragmentation. Tokens/s count matrix
products and attention at --matrix-rate, the rate that your GPU reaches (not the one of its data sheet). They leave out the
time for communication, offload and data. ZeRO-1 with offload is not listed: ZeRO-2 with offload needs no more memory and
communicates the same.
"""

import argparse

from visualchat.cli.options import add_model, make_parser


def make_plan_parser() -> argparse.ArgumentParser:
    parser = make_parser("plan", __doc__)
    add_model(parser, help="folder with a config.json (hub_configs/7b), or Hub id")
    parser.add_argument("--gpus", type=int, required=True, help="processes in all, one for each GPU")
    parser.add_argument("--gpu-memory", type=float, default=80, help="GB of one GPU (default %(default)s)")
    parser.add_argument("--reserve", type=float, default=4, help="GB that stay free (default %(default)s)")
    parser.add_argument(
        "--mode",
        choices=("alignment", "lora", "full"),
        default="alignment",
        help="what is trained, as for train (default %(default)s)",
    )
    parser.add_argument("--batch", type=int, default=1, help="per_device_train_batch_size (default %(default)s)")
    parser.add_argument("--accumulation", type=int, default=1, help="gradient_accumulation_steps (default %(default)s)")
    parser.add_argument(
        "--seq-length", type=int, help="tokens of an example, images included; by default the context, up to 4096"
    )
    parser.add_argument("--images", type=int, default=1, help="images of an example (default %(default)s)")
    parser.add_argument("--supervised", type=int, help="tokens of an example that are learned; by default all of its text")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32"), default="bf16", help="of weights and training (default %(default)s)"
    )
    parser.add_argument(
        "--checkpointing", choices=("on", "off", "both"), default="both", help="gradient checkpointing (default %(default)s)"
    )
    parser.add_argument(
        "--lora-target", choices=("decoder", "tower", "both"), default="decoder", help="as for train (default %(default)s)"
    )
    parser.add_argument("--lora-rank", type=int, default=16, help="as for train (default %(default)s)")
    parser.add_argument("--matrix-rate", type=float, help="TFLOP/s that a GPU reaches; prints tokens/s")
    parser.add_argument("--json", action="store_true", help="print the table as JSON, in bytes")
    return parser


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = make_plan_parser()
    args = parser.parse_args(argv)
    for name in ("gpus", "gpu_memory", "batch", "accumulation", "seq_length", "supervised", "lora_rank", "matrix_rate"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be more than 0, got {value:g}")
    for name in ("images", "reserve"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} must be 0 or more, got {getattr(args, name):g}")
    if args.reserve >= args.gpu_memory:
        parser.error(f"--reserve {args.reserve:g} leaves nothing of --gpu-memory {args.gpu_memory:g}")
    return args


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    from visualchat.planning.plan import check_shape, run

    try:
        args.config, args.shape = check_shape(args)
    except (OSError, ValueError) as error:
        make_plan_parser().error(str(error))
    run(args)
