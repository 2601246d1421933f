# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Has a conversation with a saved VisualChat model, using only the files in its folder:

    python -m examples.digits_demo.talk outputs/demo/model outputs/demo/conversation/messages.json answers.json

The package of this repository is blocked from being imported, so that only the code in the folder can run.
"""

import json
import sys
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin


def run_conversation(model: PreTrainedModel, processor: ProcessorMixin, messages: list[dict]) -> list[str]:
    """
    Asks the questions of a conversation one after another. In later rounds the model sees its own earlier answers, not those
    in `messages`.

    Args:
        messages (`list[dict]`): The user's messages are the questions. The assistant's messages are the true answers, which
            are only printed where the model's answer is another one.

    Returns:
        `list[str]`: The model's answers.
    """
    history, answers, number = [], [], 0
    for question, true_answer in zip(messages[::2], messages[1::2]):
        history.append(question)
        inputs = processor.apply_chat_template(
            history, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**inputs, do_sample=False, max_new_tokens=32)
        answers.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        history.append({"role": "assistant", "content": answers[-1]})

        for part in question["content"]:
            if part["type"] == "image":
                number += 1
                print(f"   [image {number}: {Path(part['path']).name}]")
            else:
                print(f"   User:      {part['text']}")
        remark = "" if answers[-1] == true_answer["content"] else f"   (wrong, the true answer is: {true_answer['content']})"
        print(f"   Assistant: {answers[-1]}{remark}", flush=True)
    return answers


def main(model_dir: str, messages_file: str, answers_file: str) -> None:
    sys.modules["modeling_visualchat"] = None
    model = AutoModelForImageTextToText.from_pretrained(model_dir, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(model_dir, trust_remote_code=True)
    answers = run_conversation(model, processor, json.loads(Path(messages_file).read_text()))
    Path(answers_file).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
