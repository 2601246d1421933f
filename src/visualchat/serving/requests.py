# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""From the body of a chat completion request to a checked conversation. After this, what strangers send is safe."""

import io
from typing import Annotated, Any, Literal

import anyio
from fastapi import Request
from fastapi.responses import JSONResponse
from huggingface_hub.utils import httpx
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from modeling_visualchat.chat_visualchat import Round, cut_section
from modeling_visualchat.image_loading_visualchat import DATA_URL, crop_for_clip, decode_base64, load_image
from visualchat.serving.limits import Limits


# Pillow reads many more, some of them by programs of the system
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
# Resizing the shorter edge to the tower's would make an enormous picture of a thin one
MAX_ASPECT_RATIO = 100
MAX_REDIRECTS = 3
DISCARDED_BYTES = 64_000_000


class RequestError(Exception):
    """What a client is told in place of an answer, in OpenAI's form."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400, headers=None):
        super().__init__(message)
        self.status, self.headers = status, headers
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.error = {"message": message, "type": kind, "param": param, "code": code}

    def to_response(self) -> JSONResponse:
        return JSONResponse({"error": self.error}, self.status, self.headers)


class Checked(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def leave_out_nulls(cls, data: Any) -> Any:
        """OpenAI's clients write null where nothing is meant."""
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


def whole(value: Any) -> Any:
    """JSON has one kind of number: 8.0 is 8."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def only(*allowed: Any, because: str) -> BeforeValidator:
    """Of a field for what this server does not do: it takes the values that ask for nothing. Null is always one."""

    def check(value: Any) -> Any:
        if value not in allowed:
            raise PydanticCustomError("unsupported_value", because)
        return value

    return BeforeValidator(check)


Whole = Annotated[int, BeforeValidator(whole)]
NO_TOOLS = "this server calls no tools, leave it out"


class ImageUrl(Checked):
    url: str
    # Of no consequence: the vision tower has one resolution
    detail: Literal["auto", "low", "high", "original"] | None = None


class Part(Checked):
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: Annotated[
        ImageUrl | None, BeforeValidator(lambda image: {"url": image} if isinstance(image, str) else image)
    ] = None
    # Of no consequence: what was read before is remembered anyway
    cache_control: Any = None
    prompt_cache_breakpoint: Any = None

    @model_validator(mode="after")
    def has_what_it_says(self) -> "Part":
        for field in ("text", "image_url"):
            if (getattr(self, field) is not None) != (field == self.type):
                raise ValueError(f"a part of the type {self.type!r} needs the field {self.type!r} and no other")
        return self


class Message(Checked):
    role: Annotated[
        Literal["system", "developer", "user", "assistant"],
        only(
            *("system", "developer", "user", "assistant"),
            because="this server calls no tools: use 'system', 'developer', 'user' or 'assistant'",
        ),
    ]
    # Those of answers, as clients give them back
    tool_calls: Annotated[Any, only([], because=NO_TOOLS)] = None
    function_call: Annotated[Any, only(because=NO_TOOLS)] = None
    audio: Annotated[Any, only(because="this server knows text and pictures only")] = None
    refusal: Annotated[Any, only("", because="this server knows no refusals: give what was said as `content`")] = None
    # Of no consequence for the answer
    name: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    annotations: Any = None
    cache_control: Any = None
    # Last: a message without it is first told what else is wrong
    content: Annotated[
        list[Part],
        BeforeValidator(lambda content: [Part(type="text", text=content)] if isinstance(content, str) else content),
    ]

    @property
    def texts(self) -> list[str]:
        return [part.text for part in self.content if part.type == "text"]


class StreamOptions(Checked):
    include_usage: bool = False
    # Of no consequence: whoever reads the connection's lengths reads those of the answer
    include_obfuscation: bool | None = None


class ChatRequest(Checked):
    """
    The fields of a chat completion, in the order of `docs/serving.md`. What would change the answer if ignored is refused,
    unless its value asks for nothing.
    """

    model: str
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Whole | None = Field(None, ge=1)
    max_tokens: Whole | None = Field(None, ge=1)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=200)]],
        Field(max_length=4),
        BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop),
    ] = []
    n: Whole = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: Whole | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: float = Field(0, ge=-2, le=2)
    frequency_penalty: float = Field(0, ge=-2, le=2)
    logit_bias: Annotated[
        dict[Annotated[int, Field(strict=False)], Annotated[float, Field(ge=-100, le=100)]],
        Field(max_length=1024),
    ] = {}
    logprobs: bool = False
    top_logprobs: Whole = Field(0, ge=0, le=20)
    # Not OpenAI's, but those of other servers of open models
    top_k: Whole | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    # Refused, unless they ask for nothing
    response_format: Annotated[Any, only({"type": "text"}, because="this server answers with plain text only")] = None
    tools: Annotated[Any, only([], because=NO_TOOLS)] = None
    tool_choice: Annotated[Any, only("none", "auto", because=NO_TOOLS)] = None
    functions: Annotated[Any, only([], because=NO_TOOLS)] = None
    function_call: Annotated[Any, only("none", "auto", because=NO_TOOLS)] = None
    modalities: Annotated[Any, only(["text"], because="this server answers with text only")] = None
    audio: Annotated[Any, only(because="this server answers with text only")] = None
    moderation: Annotated[Any, only(because="this server moderates nothing")] = None
    prediction: Annotated[Any, only(because="this server predicts nothing")] = None
    reasoning_effort: Annotated[Any, only("none", because="this model answers at once")] = None
    service_tier: Annotated[Any, only("auto", "default", because="this server has one tier")] = None
    store: Annotated[Any, only(False, because="this server stores nothing")] = None
    verbosity: Annotated[Any, only("medium", because="say in words how long the answer is to be")] = None
    web_search_options: Annotated[Any, only(because="this server searches nothing")] = None
    # Of no consequence for the answer
    user: Any = None
    metadata: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    parallel_tool_calls: bool | None = None

    @property
    def new_tokens(self) -> tuple[str, int | None]:
        """The name of the field that says how long the answer may be, and what it says."""
        name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        return name, getattr(self, name)

    @property
    def images(self) -> list[tuple[str, str]]:
        """Where each image stands in the request, and its URL."""
        return [
            (f"messages[{m}].content[{p}].image_url.url", part.image_url.url)
            for m, message in enumerate(self.messages)
            for p, part in enumerate(message.content)
            if part.type == "image_url"
        ]


async def read_body(request: Request, limits: Limits) -> bytes:
    """
    Raises:
        RequestError: If the body is not said to be JSON, is too large or takes too long.
    """
    # A page in the user's browser may send anything else to this machine without asking it first
    is_json = request.headers.get("content-type", "").split(";")[0].strip().lower() == "application/json"
    body, size = await receive_body(request, limits, limits.body_bytes if is_json else 0)
    if not is_json:
        raise RequestError("The header Content-Type must be application/json", status=415)
    if size > limits.body_bytes:
        raise RequestError(
            f"The body is larger than {limits.body_bytes:,} bytes: send fewer or smaller pictures",
            code="request_too_large",
            status=413,
        )
    return body


async def receive_body(request: Request, limits: Limits, kept: int) -> tuple[bytes, int]:
    """
    The first `kept` bytes of the body at least, and its size. Clients read no answer while they send: so what is too much is
    thrown away, up to `DISCARDED_BYTES`.

    Raises:
        RequestError: If it takes too long.
    """
    body, size = bytearray(), 0
    try:
        with anyio.fail_after(limits.body_seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if len(body) < kept:
                    body += chunk
                if size > limits.body_bytes + DISCARDED_BYTES:
                    break
    except TimeoutError as error:
        raise RequestError(f"The body did not arrive within {limits.body_seconds:g} seconds", status=408) from error
    return bytes(body), size


def parse_request(body: bytes) -> ChatRequest:
    """
    Raises:
        RequestError: Naming the field at fault.
    """
    try:
        asked = ChatRequest.model_validate_json(body)
    except ValidationError as invalid:
        error = invalid.errors(include_url=False)[0]
    else:
        check_together(asked)
        return asked
    param = "".join(f"[{one}]" if isinstance(one, int) else f".{one}" for one in error["loc"]).lstrip(".") or None
    if error["type"] == "json_invalid":
        raise RequestError(f"The body is not valid JSON: {error['ctx']['error']}", code="invalid_json")
    if error["type"] == "extra_forbidden":
        raise RequestError(f"{param}: this server does not support it, leave it out", param, "unsupported_parameter")
    if error["type"] == "missing":
        raise RequestError(f"{param}: it is required", param, "missing_required_parameter")
    problem = str(error["ctx"]["error"]) if error["type"] == "value_error" else error["msg"]
    code = "unsupported_value" if error["type"] == "unsupported_value" else "invalid_value"
    raise RequestError(f"{param or 'The body'}: {problem}, got {error['input']!r:.80}", param, code)


def check_together(asked: ChatRequest) -> None:
    """
    Raises:
        RequestError: If fields contradict each other.
    """
    lengths = {asked.max_tokens, asked.max_completion_tokens} - {None}
    if len(lengths) > 1:
        message = (
            f"max_tokens is {asked.max_tokens}, but max_completion_tokens {asked.max_completion_tokens}: give one of them"
        )
        raise RequestError(message, "max_tokens", "invalid_value")
    if asked.top_logprobs and not asked.logprobs:
        message = f"top_logprobs: {asked.top_logprobs} are asked for, but logprobs is not true"
        raise RequestError(message, "top_logprobs", "invalid_value")


def read_rounds(asked: ChatRequest, limits: Limits) -> tuple[str | None, list[Round], list[int]]:
    """
    The system message; the rounds, of which the last is to be answered, and may have the beginning of an answer; and how
    many images each brings, which come later. Messages of the user that follow each other are one, as those before them of
    the system and developer are.

    Raises:
        RequestError: If there are too many images, from elsewhere than allowed, or if roles or parts are wrong.
    """
    if asked.n > limits.choices:
        raise RequestError(f"n: this server gives up to {limits.choices} answers, got {asked.n}", "n", "invalid_value")
    images = asked.images
    if len(images) > limits.images:
        raise RequestError(
            f"The conversation has {len(images)} images, but this server takes up to {limits.images}",
            images[limits.images][0],
            "too_many_images",
        )
    for param, url in images:
        check_url(url, param, limits)
    systems: list[str] = []
    questions: list[list[str]] = []
    answers: list[list[str]] = []
    counts: list[int] = []
    previous = None
    for index, message in enumerate(asked.messages):
        where, role = f"messages[{index}]", message.role
        num_images = sum(part.type == "image_url" for part in message.content)
        if num_images and role != "user":
            raise wrong_message(where, f"it holds a picture, but has the role {role!r}: only the user brings pictures")
        if role == "user":
            if previous != "user":
                questions.append([])
                answers.append([])
                counts.append(0)
            questions[-1] += message.texts
            counts[-1] += num_images
        elif role == "assistant":
            if previous != "user":
                raise wrong_message(where, "it has the role 'assistant', but answers no message of the user")
            answers[-1] = message.texts
        elif questions:
            raise wrong_message(where, f"it has the role {role!r}, which only messages before the user's first may have")
        else:
            systems += message.texts
        previous = role
    if not questions:
        raise RequestError("messages: there are only system messages, and none of the user", "messages", "invalid_value")
    rounds = [Round("\n".join(question), answer="\n".join(answer)) for question, answer in zip(questions, answers)]
    if cut_section(rounds[-1].answer) != rounds[-1].answer:
        raise wrong_message(where, "it holds a section line of the prompt, after which an answer cannot go on")
    return "\n".join(systems) if systems else None, rounds, counts


def wrong_message(where: str, problem: str) -> RequestError:
    return RequestError(f"{where}: {problem}", where, "invalid_value")


def check_url(url: str, param: str, limits: Limits) -> None:
    """
    Raises:
        RequestError: If it is neither a data URL nor that of an allowed host.
    """
    if DATA_URL.match(url):
        return
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https"):
        raise RequestError(
            f"{param}: pictures must be data URLs (data:image/png;base64,…), this server reads no files; got {url!r:.80}",
            param,
            "invalid_image_url",
        )
    # Without the port where it is the scheme's own
    if parsed.netloc.decode().lower() not in limits.hosts or parsed.userinfo:
        raise RequestError(
            f"{param}: this server fetches nothing from {parsed.host!r}: send the picture as a data URL"
            " (its operator may allow hosts with --allow-host)",
            param,
            "invalid_image_url",
        )


async def fetch_picture(url: str, param: str, limits: Limits) -> bytes:
    """
    Downloads from an allowed host, also by way of other allowed hosts.

    Raises:
        RequestError: If that fails, takes too long or is too large.
    """
    asked = url
    try:
        with anyio.fail_after(limits.fetch_seconds):
            # As it lies there: what is sent compressed could be any size
            headers = {"Accept-Encoding": "identity"}
            async with httpx.AsyncClient(timeout=limits.fetch_seconds, headers=headers) as client:
                for _ in range(1 + MAX_REDIRECTS):
                    check_url(url, param, limits)
                    async with client.stream("GET", url) as response:
                        if response.next_request is not None:
                            url = str(response.next_request.url)
                            continue
                        response.raise_for_status()
                        data = bytearray()
                        async for chunk in response.aiter_raw():
                            data += chunk
                            check_size(len(data), param, limits)
                        return bytes(data)
    except (TimeoutError, httpx.HTTPError) as error:
        reason = str(error) or f"no answer within {limits.fetch_seconds:g} seconds"
        raise RequestError(f"{param}: cannot fetch {asked:.200}: {reason}", param, "invalid_image_url") from error
    raise RequestError(f"{param}: {asked:.200} was redirected more than {MAX_REDIRECTS} times", param, "invalid_image_url")


def decode_data_url(url: str, param: str, limits: Limits) -> bytes:
    """
    Raises:
        RequestError: If it does not hold base64, or too much of it.
    """
    head, _, encoded = url.partition(",")
    if not head.lower().endswith(";base64"):
        raise RequestError(
            f"{param}: a data URL must begin with data:image/png;base64, or the like, got {url!r:.80}",
            param,
            "invalid_base64",
        )
    check_size(len(encoded) * 3 // 4 - 2, param, limits)
    try:
        return decode_base64(url)
    except ValueError as error:  # binascii's among them
        raise RequestError(f"{param}: broken base64: {error}", param, "invalid_base64") from error


def check_size(size: int, param: str, limits: Limits) -> None:
    if size > limits.image_bytes:
        raise RequestError(f"{param}: the picture has more than {limits.image_bytes:,} bytes", param, "image_too_large")


def open_picture(data: bytes, param: str, image_processor, limits: Limits) -> Image.Image:
    """
    The part of a picture that the image processor keeps: see [`crop_for_clip`].

    Raises:
        RequestError: If it cannot be read, has too many pixels or is too thin.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=PICTURE_FORMATS)
    except Image.DecompressionBombError as error:
        raise RequestError(f"{param}: {error}", param, "image_too_large") from error
    except UnidentifiedImageError as error:
        kinds = ", ".join(PICTURE_FORMATS)
        raise RequestError(f"{param}: not a picture that can be read: send {kinds}", param, "invalid_image") from error
    except Exception as error:  # Pillow's readers raise what they happen to stumble over
        raise RequestError(f"{param}: broken picture: {error}", param, "invalid_image") from error
    width, height = image.size
    if width * height > limits.image_pixels:
        raise RequestError(
            f"{param}: the picture has {width} × {height} pixels, more than {limits.image_pixels:,}",
            param,
            "image_too_large",
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise RequestError(
            f"{param}: the picture has {width} × {height} pixels, one edge more than {MAX_ASPECT_RATIO} times the other",
            param,
            "invalid_image",
        )
    try:
        image.load()
        image = load_image(image, param)
    except Exception as error:
        raise RequestError(f"{param}: broken picture: {error}", param, "invalid_image") from error
    return crop_for_clip(image, image_processor)
