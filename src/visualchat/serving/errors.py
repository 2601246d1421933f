# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The errors of the API."""

from fastapi.responses import JSONResponse


class RequestError(Exception):
    """An error that the client gets in OpenAI's format, with an HTTP status."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400, headers=None):
        super().__init__(message)
        self.status, self.headers = status, headers
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.error = {"message": message, "type": kind, "param": param, "code": code}

    def to_response(self) -> JSONResponse:
        return JSONResponse({"error": self.error}, self.status, self.headers)


def overloaded_error(reason: str) -> RequestError:
    return RequestError(f"{reason}: try again later", code="server_overloaded", status=503, headers={"Retry-After": "1"})


def stopping_error() -> RequestError:
    return RequestError(
        "The server is stopping: try again later", code="server_stopping", status=503, headers={"Retry-After": "1"}
    )
