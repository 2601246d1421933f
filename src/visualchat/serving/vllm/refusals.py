# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Refuses what vLLM would ignore in silence:

    vllm serve FOLDER --middleware visualchat.serving.vllm.refusals.RefuseIgnoredParameters
"""

from typing import Any

from pydantic import ValidationError, create_model
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from visualchat.serving.errors import RequestError
from visualchat.serving.requests import ChatRequest, StrictModel, describe_invalid


PATH = "/chat/completions"
# vLLM knows them, and gives them to the chat template, which does nothing with them
GIVEN_TO_TEMPLATE = ("reasoning_effort", "documents")


def is_ignored(name: str) -> bool:
    return name not in ChatCompletionRequest.model_fields or name in GIVEN_TO_TEMPLATE


# They have the values that `visualchat serve` takes: those that ask for nothing
IgnoredParameters = create_model(
    "IgnoredParameters",
    __base__=StrictModel,
    **{name: (field.annotation, field) for name, field in ChatRequest.model_fields.items() if is_ignored(name)},
)


def check_parameters(body: Any) -> None:
    """
    Raises:
        RequestError: If the body of a chat completion has a parameter that vLLM would ignore although it asks for something.
            What vLLM itself refuses may pass.
    """
    if not isinstance(body, dict):
        return
    try:
        IgnoredParameters.model_validate({name: value for name, value in body.items() if is_ignored(name)})
    except ValidationError as invalid:
        raise describe_invalid(invalid) from invalid


class RefuseIgnoredParameters:
    """ASGI middleware: a chat completion that [`check_parameters`] refuses gets status 400 and does not reach vLLM."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].endswith(PATH):
            await self.app(scope, receive, send)
            return
        try:
            body = await Request(scope, receive).body()
        except ClientDisconnect:
            return
        try:
            check_parameters(parse(body))
        except RequestError as error:
            await error.to_response()(scope, receive, send)
            return
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            return first.pop() if first else await receive()

        await self.app(scope, receive_again, send)


def parse(body: bytes) -> Any:
    """The JSON, or `None` if it is none, which vLLM refuses."""
    try:
        return from_json(body)
    except ValueError:
        return None
