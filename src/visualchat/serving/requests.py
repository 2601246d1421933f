# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Reads a chat completion request and checks everything in it, since it may come from anybody: fields, limits, images."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from modeling_visualchat.chat_rounds_visualchat import Round, join_texts
from modeling_visualchat.chat_streaming_visualchat import cut_section
from visualchat.serving.errors import MAX_PARAM, RequestError, cut, show
from visualchat.serving.images import check_url
from visualchat.serving.json_limits import check_json
from visualchat.serving.limits import Limits


class StrictModel(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def leave_out_nulls(cls, data: Any) -> Any:
        """OpenAI's clients send null for fields that are not set."""
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


def accept_integral_float(value: Any) -> Any:
    """Accepts 8.0 for 8: JSON does not distinguish integers from floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def allow_only(*allowed: Any, because: str) -> BeforeValidator:
    """For the field of a feature that this server lacks: only null and `allowed`, values that do not use it, pass."""

    def check(value: Any) -> Any:
        if value not in allowed:
            raise PydanticCustomError("unsupported_value", because)
        return value

    return BeforeValidator(check)


Integer = Annotated[int, BeforeValidator(accept_integral_float)]
NO_TOOLS = "this server calls no tools, leave it out"
# Whose pages show the error to people, and do not show what was sent
OPEN_WEBUI_TOOLS = f"{NO_TOOLS} (in Open WebUI, take Builtin Tools from the capabilities of the model)"


class ImageUrl(StrictModel):
    url: str
    # Ignored: the vision tower has one resolution
    detail: Literal["auto", "low", "high", "original"] | None = None


class Part(StrictModel):
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: Annotated[
        ImageUrl | None, BeforeValidator(lambda image: {"url": image} if isinstance(image, str) else image)
    ] = None
    # Ignored: this server caches without being told
    cache_control: Any = None
    prompt_cache_breakpoint: Any = None

    @model_validator(mode="after")
    def has_what_it_says(self) -> "Part":
        for field in ("text", "image_url"):
            if (getattr(self, field) is not None) != (field == self.type):
                raise ValueError(f"a part of the type {self.type!r} needs the field {self.type!r} and no other")
        return self


class Message(StrictModel):
    role: Annotated[
        Literal["system", "developer", "user", "assistant"],
        allow_only(
            *("system", "developer", "user", "assistant"),
            because="this server calls no tools: use 'system', 'developer', 'user' or 'assistant'",
        ),
    ]
    # Fields of answers, which clients send back with the conversation
    tool_calls: Annotated[Any, allow_only([], because=NO_TOOLS)] = None
    function_call: Annotated[Any, allow_only(because=NO_TOOLS)] = None
    audio: Annotated[Any, allow_only(because="this server takes text and images only")] = None
    refusal: Annotated[Any, allow_only("", because="this server has no refusals: send the text as `content`")] = None
    # Ignored
    name: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    annotations: Any = None
    cache_control: Any = None
    # Last, so that errors of the other fields are reported before a missing `content`
    content: Annotated[
        list[Part],
        FailFast(),
        BeforeValidator(lambda content: [Part(type="text", text=content)] if isinstance(content, str) else content),
    ]

    @property
    def texts(self) -> list[str]:
        return [part.text for part in self.content if part.type == "text"]


class StreamOptions(StrictModel):
    include_usage: bool = False
    # Ignored: it would add padding against observers who measure the lengths of packets
    include_obfuscation: bool | None = None


class ChatRequest(StrictModel):
    """
    The fields of a chat completion, in the order of `docs/serving.md`. A field that this server does not support is refused,
    unless its value asks for the default behaviour. Fields that do not change the answer are ignored.
    """

    model: str
    messages: Annotated[list[Message], FailFast(), Field(min_length=1)]
    max_completion_tokens: Integer | None = Field(None, ge=1)
    max_tokens: Integer | None = Field(None, ge=1)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=200)]],
        Field(max_length=4),
        BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop),
    ] = []
    n: Integer = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: Integer | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: float = Field(0, ge=-2, le=2)
    frequency_penalty: float = Field(0, ge=-2, le=2)
    logit_bias: Annotated[
        dict[Annotated[int, Field(strict=False)], Annotated[float, Field(ge=-100, le=100)]],
        Field(max_length=1024),
    ] = {}
    logprobs: bool = False
    top_logprobs: Integer = Field(0, ge=0, le=20)
    # Extensions that other servers of open models have, such as vLLM
    top_k: Integer | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    # Refused, unless they ask for the default behaviour
    response_format: Annotated[Any, allow_only({"type": "text"}, because="this server answers with plain text only")] = None
    tools: Annotated[Any, allow_only([], because=OPEN_WEBUI_TOOLS)] = None
    tool_choice: Annotated[Any, allow_only("none", "auto", because=NO_TOOLS)] = None
    functions: Annotated[Any, allow_only([], because=NO_TOOLS)] = None
    function_call: Annotated[Any, allow_only("none", "auto", because=NO_TOOLS)] = None
    modalities: Annotated[Any, allow_only(["text"], because="this server answers with text only")] = None
    audio: Annotated[Any, allow_only(because="this server answers with text only")] = None
    moderation: Annotated[Any, allow_only(because="this server does not moderate")] = None
    prediction: Annotated[Any, allow_only(because="this server takes no predicted outputs")] = None
    reasoning_effort: Annotated[Any, allow_only("none", because="this model does not reason before it answers")] = None
    service_tier: Annotated[Any, allow_only("auto", "default", because="this server has one service tier")] = None
    store: Annotated[Any, allow_only(False, because="this server stores no completions")] = None
    verbosity: Annotated[Any, allow_only("medium", because="ask for a short or a long answer in the message instead")] = None
    web_search_options: Annotated[Any, allow_only(because="this server does not search the web")] = None
    # Ignored
    user: Any = None
    metadata: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    parallel_tool_calls: bool | None = None

    @property
    def new_tokens(self) -> tuple[str, int | None]:
        """The name and value of the field that limits the tokens of the answer: `max_completion_tokens` or `max_tokens`."""
        name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        return name, getattr(self, name)

    @property
    def images(self) -> list[tuple[str, str]]:
        """The path of each image in the request (such as `messages[0].content[1].image_url.url`) and its URL."""
        return [
            (f"messages[{m}].content[{p}].image_url.url", part.image_url.url)
            for m, message in enumerate(self.messages)
            for p, part in enumerate(message.content)
            if part.type == "image_url"
        ]


def parse_request(body: bytes, limits: Limits) -> ChatRequest:
    """
    Raises:
        RequestError: If the request is not valid, or too large. The error names the field.
    """
    check_json(body, limits)
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as invalid:
        raise describe_invalid(invalid) from invalid
    check_consistency(request)
    return request


def describe_invalid(invalid: ValidationError) -> RequestError:
    """The first error of a request that is not valid, as the client gets it."""
    error = invalid.errors(include_url=False)[0]
    keys = (f"[{one}]" if isinstance(one, int) else f".{cut(one, MAX_PARAM // 2)}" for one in error["loc"])
    param = "".join(keys).lstrip(".") or None
    if error["type"] == "json_invalid":
        return RequestError(f"The body is not valid JSON: {error['ctx']['error']}", code="invalid_json")
    if error["type"] == "extra_forbidden":
        return RequestError(f"{param}: this server does not support it, leave it out", param, "unsupported_parameter")
    if error["type"] == "missing":
        return RequestError(f"{param}: this field is required", param, "missing_required_parameter")
    problem = str(error["ctx"]["error"]) if error["type"] == "value_error" else error["msg"]
    code = "unsupported_value" if error["type"] == "unsupported_value" else "invalid_value"
    return RequestError(f"{param or 'The body'}: {problem}, got {show(error['input'])}", param, code)


def check_consistency(request: ChatRequest) -> None:
    """
    Raises:
        RequestError: If two fields contradict each other.
    """
    lengths = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(lengths) > 1:
        message = f"max_tokens is {request.max_tokens}, but max_completion_tokens {request.max_completion_tokens}: give one"
        raise RequestError(message, "max_tokens", "invalid_value")
    if request.top_logprobs and not request.logprobs:
        message = f"top_logprobs: {request.top_logprobs} are requested, but logprobs is not true"
        raise RequestError(message, "top_logprobs", "invalid_value")


def read_rounds(request: ChatRequest, limits: Limits, chat_format: str) -> tuple[str | None, list[Round], list[int]]:
    """
    Converts messages to rounds. Consecutive messages of the user are joined with a newline, as are those of the system and
    the developer, which must come first. Texts and images keep their order.

    Args:
        chat_format (`str`): The processor's. In `"paper"`, an answer that is to be continued may hold no section heading.

    Returns:
        The system message; the rounds without their images, of which the last is to be answered (if the last message is of
        the assistant, the model continues it); and the number of images of each round.

    Raises:
        RequestError: If there are too many images or choices, an image comes from a host that is not allowed, or a role is
            in the wrong order.
    """
    if request.n > limits.choices:
        raise RequestError(f"n: this server gives up to {limits.choices} answers, got {request.n}", "n", "invalid_value")
    images = request.images
    if len(images) > limits.images:
        raise RequestError(
            f"The conversation has {len(images)} images, but this server takes up to {limits.images}",
            images[limits.images][0],
            "too_many_images",
        )
    for param, url in images:
        check_url(url, param, limits)
    systems: list[str] = []
    questions: list[list[Part]] = []
    answers: list[list[str]] = []
    previous = None
    for index, message in enumerate(request.messages):
        where, role = f"messages[{index}]", message.role
        num_images = sum(part.type == "image_url" for part in message.content)
        if num_images and role != "user":
            raise invalid_message_error(
                where, f"it has an image, but the role {role!r}: only messages of the user may have images"
            )
        if role == "user":
            if previous != "user":
                questions.append([])
                answers.append([])
            questions[-1] += message.content
        elif role == "assistant":
            if previous != "user":
                raise invalid_message_error(where, "it has the role 'assistant', but does not follow a message of the user")
            answers[-1] = message.texts
        elif questions:
            raise invalid_message_error(
                where, f"it has the role {role!r}, which is only allowed before the first message of the user"
            )
        else:
            systems += message.texts
        previous = role
    if not questions:
        raise RequestError("messages: there is no message of the user", "messages", "invalid_value")
    rounds, counts = [], []
    for question, answer in zip(questions, answers):
        text, image_lines = join_texts([part.text for part in question])
        rounds.append(Round(text, answer="\n".join(answer), image_lines=image_lines))
        counts.append(sum(part.type == "image_url" for part in question))
    if chat_format == "paper" and cut_section(rounds[-1].answer) != rounds[-1].answer:
        raise invalid_message_error(
            where, "it contains a section heading of the prompt format, so the answer cannot be continued"
        )
    return "\n".join(systems) if systems else None, rounds, counts


def invalid_message_error(where: str, problem: str) -> RequestError:
    return RequestError(f"{where}: {problem}", where, "invalid_value")
