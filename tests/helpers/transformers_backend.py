"""
Conversations answered by vLLM's Transformers backend. Run as a program, it is a process that knows this package only through
the folder that it serves, as on a machine where nothing but vLLM is installed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path


# What docs/serving.md says to give
FLAGS = {
    "model_impl": "transformers",
    "trust_remote_code": True,
    "hf_overrides": {"auto_map": {"AutoModel": "modeling_visualchat.VisualChatModel"}},
}


def answer_with_backend(
    folder: Path, conversations: list[list[dict]], new_tokens: int, forbidden_token: int, **options
) -> list[dict]:
    """
    The `tokens` and their `logprobs` for each conversation, all asked at once, as OpenAI's clients send them.

    Args:
        folder (`Path`): The model.
        conversations (`list[list[dict]]`): In OpenAI's form.
        new_tokens (`int`): Generated greedily.
        forbidden_token (`int`): The placeholder's id, which `model.generate` suppresses.
        options: Of vLLM's engine.

    Raises:
        RuntimeError: If the engine does not start, with what it printed.
    """
    request = {
        "conversations": conversations,
        "new_tokens": new_tokens,
        "forbidden_token": forbidden_token,
        "options": {**FLAGS, "model": str(folder), "logprobs_mode": "processed_logprobs", **options},
    }
    result = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(request),
        env={**os.environ, "VLLM_PLUGINS": "", "PYTHONPATH": "", "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(result.stdout[-20000:] + result.stderr[-20000:])
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    from vllm import LLM, SamplingParams

    request = json.load(sys.stdin)
    bias = {request["forbidden_token"]: -100.0}
    sampling = SamplingParams(temperature=0, max_tokens=request["new_tokens"], logit_bias=bias, logprobs=0)
    outputs = LLM(**request["options"]).chat(request["conversations"], sampling, use_tqdm=False)
    answers = []
    for output in (output.outputs[0] for output in outputs):
        logprobs = [step[token].logprob for token, step in zip(output.token_ids, output.logprobs)]
        answers.append({"tokens": list(output.token_ids), "logprobs": logprobs})
    print(json.dumps(answers), flush=True)


if __name__ in ("__main__", "__mp_main__"):  # the latter in vLLM's own processes
    sys.modules["modeling_visualchat"] = None
if __name__ == "__main__":
    main()
