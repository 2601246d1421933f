# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Limits the JSON of a request before it is parsed. Parsing, and what is built from it, hold Python's interpreter lock, so that
a body of many small values would stop the whole server. Images are long, but each is one string.
"""

import re

from visualchat.serving.errors import RequestError
from visualchat.serving.limits import Limits


# The field of an image up to the data in its URL. What is inside another string does not match: its quotes are escaped
IMAGE = re.compile(rb'"(?:image_)?url"\s{0,100}:\s{0,100}"data:[^",\\]{0,200},', re.IGNORECASE)
LONGEST_MATCH = 500
# Bytes that are looked through in one call. The interpreter lock can be taken by others between two calls
PIECE = 100_000


def check_json(body: bytes, limits: Limits) -> None:
    """
    Raises:
        RequestError: If the JSON has more bytes without the data of images, or more values, than the limits allow. Invalid
            JSON may pass: parsing ends where it is invalid.
    """
    text = cut_images(body, limits)
    # Without escapes, each quotation mark begins or ends a string
    text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    values, is_string = 0, False
    for start in range(0, len(text), PIECE):
        parts = text[start : start + PIECE].split(b'"')
        structure = b"".join(parts[is_string::2])
        values += sum(map(structure.count, (b"{", b"[", b",")))
        is_string ^= len(parts) % 2 == 0
    if values > limits.values:
        raise RequestError(
            f"The body has {values:,} JSON values (messages, parts, fields and the like), but this server takes up to"
            f" {limits.values:,}: send fewer messages",
            code="request_too_large",
            status=413,
        )


def cut_images(body: bytes, limits: Limits) -> bytes:
    """
    The body without the data of its images.

    Raises:
        RequestError: If the rest has more bytes than the limits allow.
    """
    pieces, size, start = [], 0, 0
    while True:
        image = find_image(body, start, min(len(body), start + limits.text_bytes - size + 1))
        end = image.end() if image else len(body)
        size += end - start
        if size > limits.text_bytes:
            raise RequestError(
                f"Of the {len(body):,} bytes of the body, more than {limits.text_bytes:,} are no image data: send less text",
                code="request_too_large",
                status=413,
            )
        pieces.append(body[start:end])
        start = body.find(b'"', end) if image else -1
        if start < 0:
            return b"".join(pieces)
        if body[start - 1] == ord("\\"):  # an escaped quotation mark, which base64 does not have: count it as text
            start = end


def find_image(body: bytes, start: int, stop: int) -> re.Match | None:
    """The first match of `IMAGE` that begins between these positions."""
    searches = (IMAGE.search(body, k, min(k + PIECE, stop) + LONGEST_MATCH) for k in range(start, stop, PIECE))
    return next(filter(None, searches), None)
