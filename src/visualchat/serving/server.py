# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The HTTP server of `visualchat serve`, which speaks the OpenAI chat completions API.

Not built on `transformers serve`: it answers most broken requests with status 500, opens any path and URL that a request
names, has no limits and no bounded queue, and goes on with an answer whose client has gone unless it was streamed.
"""

import argparse
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import torch
import uvicorn
from anyio.to_thread import run_sync
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from modeling_visualchat.image_loading_visualchat import DATA_URL
from modeling_visualchat.image_memory_visualchat import ImageMemoryStore
from visualchat.loading import load_model, load_processor
from visualchat.serving.answers import Answer, AnswerService, Conversation, DisconnectedError, Piece
from visualchat.serving.limits import Limits
from visualchat.serving.requests import (
    ChatRequest,
    RequestError,
    decode_data_url,
    fetch_picture,
    open_picture,
    parse_request,
    read_body,
    read_rounds,
    receive_body,
)


logger = logging.getLogger("uvicorn.error")

# As nginx notes it. Nobody reads this answer
CLIENT_CLOSED_REQUEST = 499


def build_app(service: AnswerService, name: str, limits: Limits) -> FastAPI:
    """
    Args:
        service (`AnswerService`): Answers.
        name (`str`): Of the model, as requests give it.
        limits (`Limits`): Of requests.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_sync(service.close)

    app = FastAPI(title="VisualChat", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    model_card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "visualchat"}

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        try:
            response = await complete_chat(request, service, name, limits)
        except RequestError as error:
            response = error.to_response()
        except (ClientDisconnect, DisconnectedError):
            response = Response(status_code=CLIENT_CLOSED_REQUEST)
        except Exception:
            logger.exception("A request failed")
            response = internal_error().to_response()
        service.requests[response.status_code] += 1
        return response

    @app.get("/v1/models")
    async def list_models() -> dict:
        return {"object": "list", "data": [model_card]}

    @app.get("/v1/models/{asked:path}")
    async def show_model(asked: str) -> Response:
        return JSONResponse(model_card) if asked == name else unknown_model(asked, name).to_response()

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics(), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return RequestError(message, status=error.status_code, headers=error.headers).to_response()

    return app


async def complete_chat(request: Request, service: AnswerService, name: str, limits: Limits) -> Response:
    """
    Raises:
        RequestError: If the request is wrong or there is no place for it.
        DisconnectedError: If the client goes before it has a response.
    """
    try:
        service.take_place()
    except RequestError:
        await receive_body(request, limits, 0)
        raise
    try:
        asked = await run_sync(parse_request, await read_body(request, limits))
        if asked.model != name:
            raise unknown_model(asked.model, name)
        conversation = await prepare(asked, service, limits)
        answer = service.begin(asked, conversation, request.receive)
    except BaseException:
        service.leave_place()
        raise
    pieces = answer.pieces()
    # A failure before the first piece still has its status
    first = await anext(pieces)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
    if asked.stream:
        events = stream_events(answer, first, pieces, head)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    by_choice = {first.index: [first]}
    async for piece in pieces:
        by_choice.setdefault(piece.index, []).append(piece)
    choices = []
    for index, parts in by_choice.items():
        message = {"role": "assistant", "content": "".join(piece.text for piece in parts), "refusal": None}
        logprobs = to_logprobs(asked, [token for piece in parts for token in piece.logprobs])
        choice = {"index": index, "message": message, "logprobs": logprobs, "finish_reason": parts[-1].finish_reason}
        choices.append(choice)
    return JSONResponse({**head, "object": "chat.completion", "choices": choices, "usage": answer.usage})


def to_logprobs(asked: ChatRequest, tokens: list[dict]) -> dict | None:
    return {"content": tokens, "refusal": None} if asked.logprobs else None


async def prepare(asked: ChatRequest, service: AnswerService, limits: Limits) -> Conversation:
    """What costs little is checked first."""
    system, rounds, counts = read_rounds(asked, limits)
    pictures = []
    for param, url in asked.images:
        if DATA_URL.match(url):
            data = await run_sync(decode_data_url, url, param, limits)
        else:
            data = await fetch_picture(url, param, limits)
        opened = run_sync(open_picture, data, param, service.processor.image_processor, limits, limiter=service.opening)
        pictures.append(await opened)
    for one, count in zip(rounds, counts):
        one.images, pictures = pictures[:count], pictures[count:]
    asked.messages.clear()  # of encoded pictures, before the answer waits for its turn
    return await run_sync(service.fit, asked, system, rounds, limits)


async def stream_events(answer: Answer, first: Piece, pieces: AsyncIterator[Piece], head: dict) -> AsyncIterator[str]:
    """The answer as server-sent events."""
    asked = answer.asked
    head = {**head, "object": "chat.completion.chunk"}
    # Where the last event has it, the others have none
    usage = {"usage": None} if asked.stream_options.include_usage else {}
    begun = set()

    def event(index: int, delta: dict, logprobs: dict | None = None, finish_reason: str | None = None) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return to_event({**head, "choices": [choice], **usage})

    def events_of(piece: Piece) -> str:
        # As with OpenAI, each choice begins with an event of its own: clients would count what else it holds twice
        opening = "" if piece.index in begun else event(piece.index, {"role": "assistant", "content": ""})
        begun.add(piece.index)
        delta = {"content": piece.text} if piece.text else {}
        return opening + event(piece.index, delta, to_logprobs(asked, piece.logprobs), piece.finish_reason)

    yield events_of(first)
    try:
        async for piece in pieces:
            yield events_of(piece)
    except DisconnectedError:
        return
    except Exception:
        logger.exception("A request failed")
        yield to_event({"error": internal_error().error})
        return
    if usage:
        yield to_event({**head, "choices": [], "usage": answer.usage})
    yield "data: [DONE]\n\n"


def to_event(content: dict) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def unknown_model(asked: str, name: str) -> RequestError:
    return RequestError(f"There is no model {asked!r:.200} here: use {name!r}", "model", "model_not_found", status=404)


def internal_error() -> RequestError:
    """Says nothing of what happened: that is in the server's log."""
    return RequestError("The server failed to answer; its log says why", code="internal_error", status=500)


def run(args: argparse.Namespace) -> None:
    """Serves with the options of `visualchat serve`, until the process is stopped."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = load_model(args.model, args.trust_remote_code, dtype=args.dtype).to(device).eval()
        processor = load_processor(args.model, args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise SystemExit(f"cannot load {args.model}: {error}") from error
    config = model.config
    numbered = len(config.image_number_token_ids) if config.image_number_keys else args.max_images
    limits = Limits(
        body_bytes=int(args.max_body_mb * 1e6),
        images=min(args.max_images, numbered),
        choices=args.max_choices,
        image_bytes=int(args.max_image_mb * 1e6),
        image_pixels=int(args.max_image_megapixels * 1e6),
        new_tokens=args.max_new_tokens,
        hosts=frozenset(host.lower() for host in args.allow_host),
    )
    store = ImageMemoryStore(model, int(args.image_memory_gb * 2**30), args.image_memory_folder)
    try:
        service = AnswerService(model, processor, store, args.concurrency, args.queue)
    except ValueError as error:
        raise SystemExit(f"cannot serve {args.model}: {error}") from error
    app = build_app(service, args.model_name or args.model, limits)
    # Ctrl-C waits this long for open connections, then breaks them off
    uvicorn.run(app, host=args.host, port=args.port, timeout_graceful_shutdown=2)
