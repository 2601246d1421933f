# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Serve a VisualChat model over HTTP, by the OpenAI chat completions API:

    visualchat serve outputs/demo/model --port 8000
    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{
      "model": "outputs/demo/model", "messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,'$(base64 -w0 first.png)'"}},
        {"type": "text", "text": "What digit is in image 1?"}]}]}'

The server remembers an image that was sent before, in whatever conversation. It also answers GET /v1/models, /health and
/metrics (Prometheus). There is no authentication.
"""

import argparse

from visualchat.cli.options import (
    add_allowed_host,
    add_device,
    add_dtype,
    add_image_memory,
    add_model,
    make_parser,
    natural,
    not_negative,
    port,
    positive,
)
from visualchat.serving.limits import ConnectionLimits, Limits


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = make_parser("serve", __doc__)
    add_model(parser)
    parser.add_argument("--model-name", metavar="NAME", help="the model's name in requests; by default MODEL")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default %(default)s); there is no authentication"
    )
    add_allowed_host(parser)
    parser.add_argument("--port", type=port, default=8000, help="default %(default)s")
    add_device(parser)
    add_dtype(parser)
    parser.add_argument(
        "--concurrency",
        type=positive,
        default=4,
        metavar="N",
        help="answers that are generated together, in one batch; each needs memory for its cache (default %(default)s)",
    )
    parser.add_argument(
        "--queue",
        type=natural,
        default=32,
        metavar="N",
        help="requests that may wait, others get a 503 (default %(default)s)",
    )
    parser.add_argument(
        "--max-per-client",
        type=positive,
        metavar="N",
        help="requests from one address at a time, others get a 429 (default: half of --concurrency + --queue); raise it"
        " behind a proxy that does not tell addresses",
    )
    add_image_memory(parser)
    parser.add_argument(
        "--image-memory-folder",
        metavar="FOLDER",
        help="keeps remembered images as files as well, for the next start; servers may share it",
    )
    parser.add_argument(
        "--image-memory-folder-gb",
        type=not_negative,
        default=40.0,
        metavar="GB",
        help="of such files; those used least recently are deleted, other files are not (default %(default)g)",
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="HOST[:PORT]",
        help="fetch images from this host, by http and https; repeat for several (default: from none)",
    )
    connections = ConnectionLimits()
    parser.add_argument(
        "--max-connections",
        type=positive,
        default=connections.connections,
        metavar="N",
        help="at a time, fewer if the process may not open so many files (default %(default)s)",
    )
    parser.add_argument(
        "--shutdown-seconds",
        type=not_negative,
        default=connections.shutdown_seconds,
        metavar="S",
        help="after SIGTERM or Ctrl-C, answers may go on so long; a second signal ends them at once (default %(default)g)",
    )
    limits = Limits()
    parser.add_argument(
        "--max-body-mb",
        type=not_negative,
        default=limits.body_bytes / 1e6,
        metavar="MB",
        help="of a request (default %(default)g)",
    )
    parser.add_argument(
        "--max-text-mb",
        type=not_negative,
        default=limits.text_bytes / 1e6,
        metavar="MB",
        help="of a request without the data of its images (default %(default)g)",
    )
    parser.add_argument(
        "--max-json-values",
        type=positive,
        default=limits.values,
        metavar="N",
        help="of a request: messages, parts, fields and the like (default %(default)s)",
    )
    parser.add_argument(
        "--max-images", type=natural, default=limits.images, metavar="N", help="of a conversation (default %(default)s)"
    )
    parser.add_argument(
        "--max-choices", type=positive, default=limits.choices, metavar="N", help="`n` of a request (default %(default)s)"
    )
    parser.add_argument(
        "--max-image-mb",
        type=not_negative,
        default=limits.image_bytes / 1e6,
        metavar="MB",
        help="of an image file (default %(default)g)",
    )
    parser.add_argument(
        "--max-image-megapixels",
        type=not_negative,
        default=limits.image_pixels / 1e6,
        metavar="N",
        help="of an image (default %(default)g)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        default=limits.new_tokens,
        metavar="N",
        help="of an answer, at most (default %(default)s)",
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    from visualchat.serving.server import run

    run(args)
