# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The limits of a request to the server, and of the connections to it."""

from dataclasses import dataclass


@dataclass
class Limits:
    """
    Args:
        body_bytes (`int`): The largest size of a request's body.
        text_bytes (`int`): The largest size of a body without the data of its images.
        values (`int`): The most values in the JSON of a body: messages, parts, fields and the like.
        body_seconds (`float`): The longest time in which the body must arrive.
        body_pause_seconds (`float`): The longest time in which nothing of it arrives.
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
    body_pause_seconds: float = 10
    images: int = 16
    choices: int = 8
    image_bytes: int = 10_000_000
    image_pixels: int = 25_000_000
    fetch_seconds: float = 10
    new_tokens: int = 512
    hosts: frozenset[str] = frozenset()


@dataclass
class ConnectionLimits:
    """
    Args:
        connections (`int`): The most connections at a time.
        head_seconds (`float`): The longest time in which the head of a request, its headers, must arrive.
        idle_seconds (`float`): How long a connection is kept for the next request.
        send_seconds (`float`): How long a client may leave its answer unread.
        shutdown_seconds (`float`): How long answers may go on after the server was told to stop.
    """

    connections: int = 1000
    head_seconds: float = 10
    idle_seconds: float = 30
    send_seconds: float = 60
    shutdown_seconds: float = 25
