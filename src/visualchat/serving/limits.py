# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""What one request to the server may ask for, at most."""

from dataclasses import dataclass


@dataclass
class Limits:
    """
    Args:
        body_bytes (`int`): Of a request.
        body_seconds (`float`): For which a request may be under way.
        images (`int`): In a conversation.
        choices (`int`): Answers to a request.
        image_bytes (`int`): Of each encoded picture.
        image_pixels (`int`): Of each picture.
        fetch_seconds (`float`): For each picture from an allowed host.
        new_tokens (`int`): Of an answer.
        hosts (`frozenset[str]`): From which pictures are fetched, with the port unless it is the scheme's own.
    """

    body_bytes: int = 32_000_000
    body_seconds: float = 60
    images: int = 16
    choices: int = 8
    image_bytes: int = 10_000_000
    image_pixels: int = 25_000_000
    fetch_seconds: float = 10
    new_tokens: int = 512
    hosts: frozenset[str] = frozenset()
