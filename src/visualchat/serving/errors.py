# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The errors of the API."""

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi.responses import JSONResponse


MAX_MESSAGE, MAX_PARAM, MAX_VALUE = 1000, 200, 80  # characters
REPR = reprlib.Repr()
REPR.maxstring = REPR.maxlong = REPR.maxother = MAX_VALUE


class RequestError(Exception):
    """
    An error that the client gets in OpenAI's format, with an HTTP status. Its message and the name of its parameter are cut
    where they are long: they may hold what the client sent.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400, headers=None):
        message, param = cut(message, MAX_MESSAGE), param and cut(param, MAX_PARAM)
        super().__init__(message)
        self.status, self.headers = status, headers
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.error = {"message": message, "type": kind, "param": param, "code": code}

    def to_response(self) -> JSONResponse:
        return JSONResponse({"error": self.error}, self.status, self.headers)


def cut(text: str, length: int) -> str:
    """The text, or its first `length` characters and an ellipsis."""
    return text if len(text) <= length else f"{text[:length]}…"


def show(value: Any) -> str:
    """A value that a client sent, as errors show it. Of a long or deep one, only the beginning is written out."""
    return cut(REPR.repr(value), MAX_VALUE)


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """
    Within a worker thread, turns exceptions that are no `Exception` into one that is. Libraries written in Rust, such as the
    tokenizer, raise such a one where they panic. It would pass all handlers of errors.
    """
    try:
        yield
    except Exception:
        raise
    except BaseException as panic:
        raise RuntimeError(f"{type(panic).__name__}: {panic}") from panic


def overloaded_error(reason: str) -> RequestError:
    return RequestError(f"{reason}: try again later", code="server_overloaded", status=503, headers={"Retry-After": "1"})


def stopping_error() -> RequestError:
    return RequestError(
        "The server is stopping: try again later", code="server_stopping", status=503, headers={"Retry-After": "1"}
    )
