# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The limits of a request to the server."""

from dataclasses import dataclass


@dataclass
class Limits:
    """
    Args:
        body_bytes (`int`): The largest size of a request's body.
        text_bytes (`int`): The largest size of a body without the data of its images.
        values (`int`): The most values in the JSON of a body: messages, parts, fields and the like.
        body_seconds (`float`): The longest time in which the body must arrive.
        images (`int`): The most images in a conversation.
        choices (`int`): The most choices (`n`) of a request.
        image_bytes (`int`): The largest size of an encoded image.
        image_pixels (`int`): The most pixels of an image.
        fetch_seconds (`float`): The longest time in which an image must arrive from an allowed host.
        new_tokens (`int`): The most generated tokens of an answer.
        hosts (`frozenset[str]`): The hosts from which images are fetched, as `host`, or `host:port` if the port is not the
            default one of the scheme.
    """

    body_bytes: int = 32_000_000
    text_bytes: int = 2_000_000
    values: int = 20_000
    body_seconds: float = 60
    images: int = 16
    choices: int = 8
    image_bytes: int = 10_000_000
    image_pixels: int = 25_000_000
    fetch_seconds: float = 10
    new_tokens: int = 512
    hosts: frozenset[str] = frozenset()
