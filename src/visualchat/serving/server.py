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
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager

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
from visualchat.serving.answers import Answer, AnswerService, DisconnectedError
from visualchat.serving.bodies import BodyReader
from visualchat.serving.choices import AnswerChunk, Conversation
from visualchat.serving.connections import possible_connections
from visualchat.serving.errors import RequestError, cut, show
from visualchat.serving.hosts import HostMiddleware, find_allowed_hosts
from visualchat.serving.images import decode_data_url, fetch_image, open_image
from visualchat.serving.limits import ConnectionLimits, Limits
from visualchat.serving.metrics import Metrics
from visualchat.serving.process import serve
from visualchat.serving.requests import ChatRequest, parse_request, read_rounds
from visualchat.serving.turns import find_client


logger = logging.getLogger("uvicorn.error")

# The status that nginx logs for this case. The client does not see it
CLIENT_CLOSED_REQUEST = 499


def build_app(service: AnswerService, name: str, limits: Limits, hosts: Collection[str]) -> FastAPI:
    """
    Args:
        service (`AnswerService`): It generates the answers.
        name (`str`): The name of the model in requests.
        limits (`Limits`): The limits of requests.
        hosts (`Collection[str]`): The hosts under which the server is known: see [`HostMiddleware`].
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    bodies, metrics = BodyReader(limits), Metrics(service)
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_middleware(HostMiddleware, hosts=hosts, open_paths=("/health", "/health/"))
    model_card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "visualchat"}

    async def complete(request: Request) -> Response:
        try:
            response = await complete_chat(request, bodies, service, name, limits)
        except RequestError as error:
            response = error.to_response()
        except (ClientDisconnect, DisconnectedError):
            response = Response(status_code=CLIENT_CLOSED_REQUEST)
        except Exception:
            logger.exception("A request failed")
            response = internal_server_error().to_response()
        service.requests[response.status_code] += 1
        return response

    async def list_models() -> dict:
        return {"object": "list", "data": [model_card]}

    async def show_model(model_id: str) -> Response:
        is_known = model_id.rstrip("/") == name.rstrip("/")
        return JSONResponse(model_card) if is_known else unknown_model_error(model_id, name).to_response()

    async def health() -> dict:
        return {"status": "ok"}

    async def show_metrics() -> Response:
        return Response(metrics.to_text(), media_type=CONTENT_TYPE_LATEST)

    # Clients send a slash at the end as well, and load balancers send HEAD
    reading = ["GET", "HEAD"]
    for ending in ("", "/"):
        app.add_api_route(f"/v1/chat/completions{ending}", complete, methods=["POST"])
        app.add_api_route(f"/v1/models{ending}", list_models, methods=reading)
        app.add_api_route(f"/health{ending}", health, methods=reading)
        app.add_api_route(f"/metrics{ending}", show_metrics, methods=reading)
    app.add_api_route("/v1/models/{model_id:path}", show_model, methods=reading)

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {cut(request.url.path, 200)}: {error.detail}"
        if error.status_code == 404:  # most often of a base URL without /v1, or of OpenAI's other APIs
            message += (
                ". This server has POST /v1/chat/completions and GET /v1/models: give clients a base URL that ends in /v1,"
                " and let them use the chat completions API"
            )
        return RequestError(message, status=error.status_code, headers=error.headers).to_response()

    return app


async def complete_chat(request: Request, bodies: BodyReader, service: AnswerService, name: str, limits: Limits) -> Response:
    """
    Raises:
        RequestError: If the request is not valid or no slot is free.
        DisconnectedError: If the client disconnects before the response begins.
    """
    body, client = await bodies.read(request), find_client(request)
    service.take_slot(client)
    try:
        chat_request = await run_sync(parse_request, body, limits)
        del body  # frees the encoded images while the answer waits in the queue
        if chat_request.model != name:
            raise unknown_model_error(chat_request.model, name)
        conversation = await prepare_conversation(chat_request, service, limits)
        answer = service.submit(chat_request, conversation, request.receive, client)
    except BaseException:
        service.release_slot(client)
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
    system, rounds, counts = await run_sync(read_rounds, chat_request, limits, service.processor.chat_format)
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
    chat_request.messages.clear()  # they hold the encoded images too
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
    except RequestError as error:
        yield to_event({"error": error.error})
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
        f"There is no model {show(model)} on this server: use {name!r}", "model", "model_not_found", status=404
    )


def internal_server_error() -> RequestError:
    """An error without details, which are in the server's log only."""
    return RequestError("The server failed to answer. Its log has the details", code="internal_error", status=500)


def run(args: argparse.Namespace) -> None:
    """
    Runs `visualchat serve` with these options, until the process is stopped.

    Raises:
        InputError: If the model, the address or a name cannot be used.
        KeyboardInterrupt: After Ctrl-C.
    """
    hosts = find_allowed_hosts(args.host, args.allowed_host)
    with input_errors(f"cannot load {args.model}: "):
        model = load_model(args.model, args.trust_remote_code, dtype=args.dtype)
        model = model.to(choose_device(args.device)).eval()
        processor = load_processor(args.model, args.trust_remote_code)
    limits = Limits(
        body_bytes=int(args.max_body_mb * 1e6),
        text_bytes=int(args.max_text_mb * 1e6),
        values=args.max_json_values,
        images=min(args.max_images, model.config.max_image_number or args.max_images),
        choices=args.max_choices,
        image_bytes=int(args.max_image_mb * 1e6),
        image_pixels=int(args.max_image_megapixels * 1e6),
        new_tokens=args.max_new_tokens,
        hosts=frozenset(host.lower() for host in args.allow_host),
    )
    memory_bytes, folder_bytes = (int(gb * 2**30) for gb in (args.image_memory_gb, args.image_memory_folder_gb))
    store = ImageMemoryStore(model, memory_bytes, args.image_memory_folder, folder_bytes)
    with input_errors(f"cannot serve {args.model}: "):
        service = AnswerService(model, processor, store, args.concurrency, args.queue, args.max_per_client)
    app = build_app(service, args.model_name or args.model, limits, hosts)
    connections = ConnectionLimits(possible_connections(args.max_connections), shutdown_seconds=args.shutdown_seconds)
    serve(app, service, args.host, args.port, connections)
