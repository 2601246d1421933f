# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Answers to many questions at once, and how they are compared with the true ones."""

import re
import string

import torch

from modeling_visualchat import VisualChatProcessor
from modeling_visualchat.chat_visualchat import AnswerReader


WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def generate_answers(
    model: torch.nn.Module,
    processor: VisualChatProcessor,
    conversations: list[list[dict]],
    **generation,
) -> list[str]:
    """
    Answers the last question of each conversation, all of them in one batch, as [`ChatSession`] answers one.

    Args:
        conversations (`list[list[dict]]`): Messages, of which the last is the user's.
        generation: As for `model.generate`.
    """
    inputs = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        sanitize_control_tokens=True,
        processor_kwargs={"padding": True, "padding_side": "left"},
    ).to(model.device)
    end_tokens = generation.get("eos_token_id", model.generation_config.eos_token_id)
    reader = AnswerReader(processor.tokenizer, inputs["input_ids"].shape[1], end_tokens)
    tokens = model.generate(**inputs, **generation, stopping_criteria=[reader])
    return [reader.answer(row) for row in tokens]


def text_of(content: str | list[dict]) -> str:
    """The words of a message's content, as the chat template joins them."""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content if part["type"] == "text")


def is_exact(answer: str, label: str) -> bool:
    """Whether an answer is right word for word; blanks around it do not count."""
    return answer.strip() == label.strip()


def is_normalized_match(answer: str, label: str) -> bool:
    """Whether an answer is right once both are normalized; see [`normalize`]."""
    return normalize(answer) == normalize(label)


def normalize(answer: str) -> str:
    """
    As SQuAD's scorer does: lower case, without ASCII punctuation, without the articles a, an and the, single blanks. What
    consists of nothing else is left as it is, in lower case, so that the choice "A" is not taken for an empty answer.
    """
    lower = " ".join(answer.lower().split())
    words = lower.translate(WITHOUT_PUNCTUATION)
    kept = " ".join(re.sub(r"\b(a|an|the)\b", " ", words).split())
    return kept or " ".join(words.split()) or lower
