# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Generates the answers to a batch of questions, and compares answers with the true ones."""

import re
import string

import torch

from modeling_visualchat import VisualChatProcessor
from modeling_visualchat.chat_streaming_visualchat import AnswerReader


WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def generate_answers(
    model: torch.nn.Module,
    processor: VisualChatProcessor,
    conversations: list[list[dict]],
    **generation,
) -> list[str]:
    """
    Answers the last question of each conversation in one batch. The answers are those that [`ChatSession`] gives.

    Args:
        conversations (`list[list[dict]]`): Messages. The last message of each conversation is the user's.
        generation: Arguments of `model.generate`.
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
    reader = AnswerReader(processor, inputs["input_ids"].shape[1], end_tokens)
    tokens = model.generate(**inputs, **generation, stopping_criteria=[reader])
    return [reader.answer(sequence) for sequence in tokens]


def text_of(content: str | list[dict]) -> str:
    """The text of a message's content. Text parts are joined as in the chat template."""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content if part["type"] == "text")


def is_exact(answer: str, label: str) -> bool:
    """Whether an answer equals the true one, word for word. Blanks around them do not count."""
    return answer.strip() == label.strip()


def is_normalized_match(answer: str, label: str) -> bool:
    """Whether an answer equals the true one after both are normalized; see [`normalize`]."""
    return normalize(answer) == normalize(label)


def normalize(answer: str) -> str:
    """
    Normalizes as SQuAD's scorer does: lower case, no ASCII punctuation, no articles (a, an, the), single blanks. An answer
    that consists of articles or punctuation alone keeps them, so that the choice "A" does not become an empty answer.
    """
    lower = " ".join(answer.lower().split())
    words = lower.translate(WITHOUT_PUNCTUATION)
    kept = " ".join(re.sub(r"\b(a|an|the)\b", " ", words).split())
    return kept or " ".join(words.split()) or lower
