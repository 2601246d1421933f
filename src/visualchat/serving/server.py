# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The HTTP server of `visualchat serve`. It implements the OpenAI chat completions API.

It is not built on `transformers serve`, which answers most invalid requests with status 500, opens any path and URL that a
request names, has no limits and no bounded queue, and continues an answer that is not streamed after its client has
disconnected.
"""

import argparse
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from anyio.to_thread import run_sync
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from modeling_visualchat.image_loading_visualchat import DATA_URL
from modeling_visualchat.image_memory_visualchat import ImageMemoryStore
from visualchat.errors import input_errors
from visualchat.loading import choose_device, load_model, load_processor
from visualchat.serving.answers import Answer, AnswerChunk, AnswerService, Conversation, DisconnectedError
from visualchat.serving.errors import RequestError
from visualchat.serving.images import decode_data_url, fetch_image, open_image
from visualchat.serving.limits import Limits
from visualchat.serving.requests import ChatRequest, parse_request, read_body, read_rounds, receive_body


logger = logging.getLogger("uvicorn.error")

# The status that nginx logs for this case. The client does not see it
CLIENT_CLOSED_REQUEST = 499


def build_app(service: AnswerService, name: str, limits: Limits) -> FastAPI:
    """
    Args:
        service (`AnswerService`): It generates the answers.
        name (`str`): The name of the model in requests.
        limits (`Limits`): The limits of requests.
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
            response = internal_server_error().to_response()
        service.requests[response.status_code] += 1
        return response

    @app.get("/v1/models")
    async def list_models() -> dict:
        return {"object": "list", "data": [model_card]}

    @app.get("/v1/models/{model_id:path}")
    async def show_model(model_id: str) -> Response:
        return JSONResponse(model_card) if model_id == name else unknown_model_error(model_id, name).to_response()

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
        RequestError: If the request is not valid or no slot is free.
        DisconnectedError: If the client disconnects before the response begins.
    """
    try:
        service.take_slot()
    except RequestError:
        await receive_body(request, limits, 0)
        raise
    try:
        chat_request = await run_sync(parse_request, await read_body(request, limits))
        if chat_request.model != name:
            raise unknown_model_error(chat_request.model, name)
        conversation = await prepare_conversation(chat_request, service, limits)
        answer = service.submit(chat_request, conversation, request.receive)
    except BaseException:
        service.release_slot()
        raise
    chunks = answer.chunks()
    # An error before the first chunk is still answered with its own HTTP status
    first = await anext(chunks)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
    if chat_request.stream:
        events = stream_events(answer, first, chunks, head)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    by_choice = {first.index: [first]}
    async for chunk in chunks:
        by_choice.setdefault(chunk.index, []).append(chunk)
    choices = []
    for index, parts in by_choice.items():
        message = {"role": "assistant", "content": "".join(chunk.text for chunk in parts), "refusal": None}
        logprobs = to_logprobs(chat_request, [token for chunk in parts for token in chunk.logprobs])
        choice = {"index": index, "message": message, "logprobs": logprobs, "finish_reason": parts[-1].finish_reason}
        choices.append(choice)
    return JSONResponse({**head, "object": "chat.completion", "choices": choices, "usage": answer.usage})


def to_logprobs(chat_request: ChatRequest, tokens: list[dict]) -> dict | None:
    return {"content": tokens, "refusal": None} if chat_request.logprobs else None


async def prepare_conversation(chat_request: ChatRequest, service: AnswerService, limits: Limits) -> Conversation:
    """Reads and opens the images, then tokenizes the conversation. Cheap checks come first."""
    system, rounds, counts = read_rounds(chat_request, limits)
    images = []
    for param, url in chat_request.images:
        if DATA_URL.match(url):
            data = await run_sync(decode_data_url, url, param, limits)
        else:
            data = await fetch_image(url, param, limits)
        opened = run_sync(open_image, data, param, service.processor.image_processor, limits, limiter=service.image_limiter)
        images.append(await opened)
    for one, count in zip(rounds, counts):
        one.images, images = images[:count], images[count:]
    chat_request.messages.clear()  # frees the encoded images while the answer waits in the queue
    return await run_sync(service.prepare, chat_request, system, rounds, limits)


async def stream_events(
    answer: Answer, first: AnswerChunk, chunks: AsyncIterator[AnswerChunk], head: dict
) -> AsyncIterator[str]:
    """Yields the answer as server-sent events."""
    chat_request = answer.request
    head = {**head, "object": "chat.completion.chunk"}
    # As in OpenAI's API: if the last event has the usage, it is null in all others
    usage = {"usage": None} if chat_request.stream_options.include_usage else {}
    started = set()

    def event(index: int, delta: dict, logprobs: dict | None = None, finish_reason: str | None = None) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return to_event({**head, "choices": [choice], **usage})

    def events_of(chunk: AnswerChunk) -> str:
        # As in OpenAI's API, a choice begins with an event that has only the role. Clients would count other content twice
        opening = "" if chunk.index in started else event(chunk.index, {"role": "assistant", "content": ""})
        started.add(chunk.index)
        delta = {"content": chunk.text} if chunk.text else {}
        return opening + event(chunk.index, delta, to_logprobs(chat_request, chunk.logprobs), chunk.finish_reason)

    yield events_of(first)
    try:
        async for chunk in chunks:
            yield events_of(chunk)
    except DisconnectedError:
        return
    except Exception:
        logger.exception("A request failed")
        yield to_event({"error": internal_server_error().error})
        return
    if usage:
        yield to_event({**head, "choices": [], "usage": answer.usage})
    yield "data: [DONE]\n\n"


def to_event(content: dict) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def unknown_model_error(model: str, name: str) -> RequestError:
    return RequestError(
        f"There is no model {model!r:.200} on this server: use {name!r}", "model", "model_not_found", status=404
    )


def internal_server_error() -> RequestError:
    """An error without details, which are in the server's log only."""
    return RequestError("The server failed to answer. Its log has the details", code="internal_error", status=500)


def run(args: argparse.Namespace) -> None:
    """Runs `visualchat serve` with these options, until the process is stopped."""
    with input_errors(f"cannot load {args.model}: "):
        model = load_model(args.model, args.trust_remote_code, dtype=args.dtype)
        model = model.to(choose_device(args.device)).eval()
        processor = load_processor(args.model, args.trust_remote_code)
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
    memory_bytes, folder_bytes = (int(gb * 2**30) for gb in (args.image_memory_gb, args.image_memory_folder_gb))
    store = ImageMemoryStore(model, memory_bytes, args.image_memory_folder, folder_bytes)
    with input_errors(f"cannot serve {args.model}: "):
        service = AnswerService(model, processor, store, args.concurrency, args.queue)
    app = build_app(service, args.model_name or args.model, limits)
    # After Ctrl-C, the server waits this many seconds for open connections before it closes them
    uvicorn.run(app, host=args.host, port=args.port, timeout_graceful_shutdown=2)
