# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Refuses what vLLM would ignore in silence:

    vllm serve FOLDER --middleware visualchat.serving.vllm.refusals.RefuseIgnoredParameters
"""

from collections.abc import Callable
from typing import Any

from pydantic import ValidationError, create_model
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as Event
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from visualchat.serving.errors import RequestError
from visualchat.serving.requests import ChatRequest, Message, StrictModel, describe_invalid


PATH = "/chat/completions"
# vLLM knows them, and gives them to the chat template, which does nothing with them
GIVEN_TO_TEMPLATE = ("reasoning_effort", "documents")
# What vLLM reads of a message
READ_OF_MESSAGES = ("role", "content")


def is_ignored(name: str) -> bool:
    return name not in ChatCompletionRequest.model_fields or name in GIVEN_TO_TEMPLATE


def select_fields(model: type[StrictModel], name: str, is_chosen: Callable[[str], bool], **others) -> type[StrictModel]:
    """A model with those fields of another that are chosen. They take the values that ask `visualchat serve` for nothing."""
    chosen = {field: (info.annotation, info) for field, info in model.model_fields.items() if is_chosen(field)}
    return create_model(name, __base__=StrictModel, **chosen, **others)


IgnoredOfMessage = select_fields(Message, "IgnoredOfMessage", lambda name: name not in READ_OF_MESSAGES)
IgnoredParameters = select_fields(ChatRequest, "IgnoredParameters", is_ignored, messages=(list[IgnoredOfMessage], []))


def check_parameters(body: Any) -> None:
    """
    Raises:
        RequestError: If the body of a chat completion has a parameter, or one of its messages a field, that vLLM would
            ignore although it asks for something. What vLLM itself refuses may pass.
    """
    if not isinstance(body, dict):
        return
    ignored = {name: value for name, value in body.items() if is_ignored(name)}
    messages = body.get("messages")
    ignored["messages"] = [
        {name: value for name, value in one.items() if name not in READ_OF_MESSAGES} if isinstance(one, dict) else {}
        for one in (messages if isinstance(messages, list) else [])
    ]
    try:
        IgnoredParameters.model_validate(ignored)
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
        first: list[Event] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Event:
            return first.pop() if first else await receive()

        await self.app(scope, receive_again, send)


def parse(body: bytes) -> Any:
    """The JSON, or `None` if it is none, which vLLM refuses."""
    try:
        return from_json(body)
    except ValueError:
        return None
