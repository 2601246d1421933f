# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Receives the bodies of requests, within limits of size, time and memory."""

import anyio
from fastapi import Request

from visualchat.serving.errors import RequestError, overloaded_error
from visualchat.serving.limits import Limits


# Of a body that is too long, before the connection is closed
DISCARDED_BYTES = 64_000_000
# The memory for all bodies that are arriving, in bodies of the largest size
LARGEST_BODIES = 8


class BodyReader:
    """
    Receives bodies. A request takes no slot before its body has arrived, so the slots do not bound the memory for bodies.

    Args:
        limits (`Limits`): The limits of requests.

    Attributes:
        arriving_bytes (`int`): The memory for the bodies that are arriving.
    """

    def __init__(self, limits: Limits):
        self.limits, self.arriving_bytes = limits, 0

    async def read(self, request: Request) -> bytes:
        """
        Raises:
            RequestError: If the content type is not JSON, the body is too large or takes too long, or the bodies that are
                arriving take too much memory.
        """
        # Browsers let any web page send other content types to this machine, without asking the server first (CORS)
        is_json = request.headers.get("content-type", "").split(";")[0].strip().lower() == "application/json"
        body, size = await self._receive(request, self.limits.body_bytes if is_json else 0)
        if not is_json:
            raise RequestError("The header Content-Type must be application/json", status=415)
        if size > self.limits.body_bytes:
            raise RequestError(
                f"The body is larger than {self.limits.body_bytes:,} bytes: send fewer or smaller images",
                code="request_too_large",
                status=413,
            )
        if len(body) < size:
            raise overloaded_error("Too many large requests are arriving")
        return body

    async def _receive(self, request: Request, kept: int) -> tuple[bytes, int]:
        """
        Returns at least the first `kept` bytes of the body, fewer if there is no memory for them, and its size. Many clients
        read the response only after they have sent the whole body. So what exceeds the limit is received and discarded, up
        to `DISCARDED_BYTES`.

        Raises:
            RequestError: If it takes too long.
        """
        limits, has_memory = self.limits, True
        body, size = bytearray(), 0
        try:
            with anyio.fail_after(limits.body_seconds) as scope:
                end = scope.deadline
                scope.deadline = min(end, anyio.current_time() + limits.body_pause_seconds)
                async for chunk in request.stream():
                    scope.deadline = min(end, anyio.current_time() + limits.body_pause_seconds)
                    size += len(chunk)
                    has_memory = has_memory and self.arriving_bytes + len(chunk) <= LARGEST_BODIES * limits.body_bytes
                    if len(body) < kept and has_memory:
                        body += chunk
                        self.arriving_bytes += len(chunk)
                    if size > limits.body_bytes + DISCARDED_BYTES:
                        break
        except TimeoutError as error:
            message = (
                f"The body did not arrive within {limits.body_seconds:g} seconds, or nothing of it did for"
                f" {limits.body_pause_seconds:g} seconds"
            )
            raise RequestError(message, status=408, headers={"Connection": "close"}) from error
        finally:
            self.arriving_bytes -= len(body)
        return bytes(body), size
