"""
How far images are remembered by `visualchat serve` and by vLLM with the plugin: the time to the first token of an answer
about new images, about the same images in another conversation, and in the next round of the same conversation.

    make test-vllm               # makes .venv-vllm, in which vLLM is
    python -m benchmarks.serving_known_images

The model has the shapes of `sides.py` and random weights. Another conversation has another system message, so that its
prompt differs from its beginning on.
"""

import argparse
import random
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from benchmarks.report import write_results
from benchmarks.serving import (
    ROOT,
    SERVERS,
    ask,
    find_answer_token,
    make_body,
    make_images,
    save_sides,
    send,
    serve_command,
    serving,
    vllm_command,
)


KINDS = ("new images", "the same images in another conversation", "the next round of a conversation")


def measure(port: int, images: int, conversations: int, answer_token_id: int) -> dict[str, float]:
    """The median time to the first token, in seconds, of each of `KINDS`."""
    draw, seconds = random.Random(0), {kind: [] for kind in KINDS}
    for number in range(conversations):
        asked = ask(make_images(draw, images))
        other = {"role": "system", "content": f"Be brief, {number}."}
        answered = {"role": "assistant", "content": "None."}
        for kind, messages in zip(KINDS, ([asked], [other, asked], [asked, answered, ask([])])):
            seconds[kind].append(send(port, make_body(messages, answer_token_id)).first)
    return {kind: median(of_kind[1:]) for kind, of_kind in seconds.items()}  # the first conversation warms up


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--python", default=str(ROOT / ".venv-vllm/bin/python"), help="of the environment with vLLM; default %(default)s"
    )
    parser.add_argument("--images", type=int, default=4, help="of a conversation; default %(default)s")
    parser.add_argument("--conversations", type=int, default=4, help="default %(default)s")
    args = parser.parse_args(argv)
    results = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        ours, _ = save_sides(Path(folder), "mmca_merged")
        commands = [serve_command(ours), vllm_command(args.python, ours, args.images)]
        ports = {name: stack.enter_context(serving(command, name)) for name, command in zip(SERVERS, commands)}
        for name, port in ports.items():
            seconds = measure(port, args.images, args.conversations, find_answer_token())
            for kind in KINDS:
                print(f"{name}, {kind}: first token after {seconds[kind]:.3f} s", flush=True)
            for kind in KINDS[1:]:
                claim = f"{name}: time to the first token of {kind}, to that of new images, {args.images} images"
                ratio = round(seconds[kind] / seconds[KINDS[0]], 3)
                results.append({"claim": claim, "ratio": ratio, "target": None, "seconds": round(seconds[kind], 3)})
    write_results("serving_known_images", results)


if __name__ == "__main__":
    main()
