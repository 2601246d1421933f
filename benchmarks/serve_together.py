"""
Requests a second of `visualchat serve` where 16 answers are generated together (`--concurrency 16`), to those where they are
generated one after another (`--concurrency 1`): 16 clients, answers of 8, 32 and 64 tokens. Checks that both give the same
answers. Two servers run at the same time, and take turns.

    make demo && python -m benchmarks.serve_together
"""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from statistics import median

from transformers import AutoProcessor

import modeling_visualchat  # noqa: F401  registers the classes
from benchmarks.report import write_results
from benchmarks.serve_load import ROOT, ask, make_conversations, read_answer, serving, to_request


CLIENTS = 16
TARGET = 2.0


def send_all(port: int, bodies: list[bytes], clients: int) -> tuple[float, list[str]]:
    """Requests a second, and the answers."""
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        responses = list(pool.map(lambda body: ask(port, "POST", "/v1/chat/completions", body), bodies))
    seconds = time.perf_counter() - start
    failed = [response for response in responses if response.status != 200]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(bodies)} requests failed, the first one with {failed[0]}")
    return len(bodies) / seconds, [read_answer(response.text) for response in responses]


def compare(model_dir: str, lengths: list[int], requests: int, clients: int = CLIENTS, repeats: int = 2) -> list[dict]:
    """
    Runs the benchmark.

    Args:
        model_dir (`str`): The folder of the model.
        lengths (`list[int]`): The lengths of answers, in tokens.
        requests (`int`): The number of requests in one turn of a server.
        clients (`int`): The number of clients, and of answers that are generated together.
        repeats (`int`): The number of turns.

    Raises:
        RuntimeError: If a request fails, or the servers give different answers.
    """
    never = {str(AutoProcessor.from_pretrained(model_dir).tokenizer.eos_token_id): -100}
    conversations = make_conversations(requests)
    results = []
    with ExitStack() as stack:
        options = ["--queue", str(clients), "--max-per-client", str(2 * clients)]
        ports = [stack.enter_context(serving(model_dir, *options, "--concurrency", str(count)))[0] for count in (clients, 1)]
        for length in lengths:
            bodies = [
                json.dumps(to_request(one, max_tokens=length, logit_bias=never, stream=k % 2 == 1)).encode()
                for k, one in enumerate(conversations)
            ]
            rates = {port: [] for port in ports}
            for turn in range(repeats + 1):
                answers = {}
                for port in ports[:: -1 if turn % 2 else 1]:
                    rate, answers[port] = send_all(port, bodies, clients)
                    rates[port] += [rate] * (turn > 0)  # the first turn fills the image memory
                different = sum(a != b for a, b in zip(*answers.values()))
                if different:
                    raise RuntimeError(f"{different} of {requests} answers are others when they are generated together")
            together, apart = (median(rates[port]) for port in ports)
            print(f"answers of {length} tokens: {together:.1f} requests/s together, {apart:.1f} one by one", flush=True)
            results.append(
                {
                    "claim": f"requests/s of {clients} answers together, to those of one by one, answers of {length} tokens",
                    "ratio": round(together / apart, 3),
                    "target": TARGET,
                    "requests_per_second": [round(together, 2), round(apart, 2)],
                }
            )
    return results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=str(ROOT / "outputs/demo/model"), help="folder of the model; by default the one of make demo"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[8, 32, 64], help="in tokens; default %(default)s")
    parser.add_argument("--requests", type=int, default=48, help="of a turn; default %(default)s")
    parser.add_argument("--repeats", type=int, default=2, help="turns of each server; default %(default)s")
    args = parser.parse_args(argv)
    write_results("serve_together", compare(args.model, args.lengths, args.requests, repeats=args.repeats))


if __name__ == "__main__":
    main()
