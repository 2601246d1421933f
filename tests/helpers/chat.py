"""Conversations of a tiny model, the same from scratch, and a model that writes what it is told."""

from contextlib import contextmanager

import torch

from helpers.tiny import digit_image, make_processor
from modeling_visualchat.chat_visualchat import ChatSession


NEW_TOKENS = 8


# (question, number of its images): two that come together, rounds without any
ROUNDS = [("What is it?", 1), ("And?", 0), ("These?", 2), ("More.", 0), ("And this one?", 1), ("Bye.", 0)]


PROCESSOR = make_processor()


GREEDY = {"do_sample": False, "max_new_tokens": NEW_TOKENS}


# What these tokens spell is made of the same tokens again, so that a cached answer fits what was answered
LETTERS = PROCESSOR.tokenizer.convert_tokens_to_ids(["x", "q", "z", "j"])


SPELLED = {"suppress_tokens": sorted(set(range(len(PROCESSOR.tokenizer))) - set(LETTERS))}


def from_scratch(session: ChatSession, **generation) -> torch.Tensor:
    """The tokens of the last answer, its conversation run from the beginning with pixel values and no cache."""
    inputs = PROCESSOR.apply_chat_template(
        session.messages[:-1], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    output = session.model.generate(**inputs, **{**GREEDY, **generation})
    return output[0, inputs["input_ids"].shape[1] :]


def assert_as_from_scratch(session: ChatSession, **generation) -> None:
    assert session.rounds[-1].answer == PROCESSOR.decode(from_scratch(session, **generation), skip_special_tokens=True)


def hold(session: ChatSession, rounds: list[tuple[str, int]], first: int = 0) -> None:
    for question, images in rounds:
        session.send(question, [digit_image(k) for k in range(first, first + images)], **GREEDY)
        first += images


@contextmanager
def count_work(model):
    """Rows that enter the first decoder layer, and pictures that enter the tower."""
    work = {"rows": 0, "pictures": 0}

    def count_rows(module, args, kwargs):
        work["rows"] += args[0].shape[1]

    def count_pictures(module, args, kwargs):
        work["pictures"] += len(args[0])

    handles = [
        model.model.language_model.layers[0].register_forward_pre_hook(count_rows, with_kwargs=True),
        model.model.vision_tower.register_forward_pre_hook(count_pictures, with_kwargs=True),
    ]
    try:
        yield work
    finally:
        for handle in handles:
            handle.remove()


def writes(model, text: str):
    """The model's head is rigged to write a text, and then its end token, again and again."""
    return writes_tokens(
        model, [*PROCESSOR.tokenizer(text, add_special_tokens=False)["input_ids"], PROCESSOR.tokenizer.eos_token_id]
    )


@contextmanager
def writes_tokens(model, tokens: list[int]):
    """The model's head is rigged to write these tokens again and again."""
    step = [0]

    def rig(module, args, output):
        output = torch.full_like(output, -100.0)
        output[..., tokens[step[0] % len(tokens)]] = 100.0
        step[0] += 1
        return output

    handle = model.lm_head.register_forward_hook(rig)
    try:
        yield
    finally:
        handle.remove()
