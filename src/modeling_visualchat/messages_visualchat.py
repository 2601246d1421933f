# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The messages of a conversation: what may stand in them, checked, and which images they bring."""

from .image_loading_visualchat import ImageSource


# Characters of one message. Where a regular expression cuts a text into words, tokenizers' engine gives up after 10,000,000
# steps on a match, and panics: the demo's expression does at 2,000,000 characters without a digit or a line break
MAX_TEXT_LENGTH = 400_000
PART_KEYS = {"text": ("text",), "image": ("image", "url", "path", "base64"), "image_url": ("image_url",)}


def check_conversation(conversation: list[dict], image_token: str | None = None, name: str = "") -> list[dict]:
    """
    Checks the messages of one conversation and returns a copy without entries that are `None`, which tables of messages
    are full of. No text may hold `image_token`, because it would be taken for an image. Errors begin with `name`.
    """
    if not conversation:
        raise ValueError(f"{name}the conversation is empty: it needs at least one message from the user")
    checked = []
    expected = "user"
    for index, message in enumerate(conversation):
        where = f"{name}message {index}"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"{where} has the role {role!r}: use 'system', 'user' or 'assistant'")
        if role == "system":
            if index > 0:
                raise ValueError(f"{where} has the role 'system', which only the first message may have")
        elif role != expected:
            raise ValueError(f"{where} has the role {role!r}, but user and assistant take turns: expected {expected!r}")
        else:
            expected = "assistant" if role == "user" else "user"

        content = message.get("content")
        if isinstance(content, list | tuple):
            content = [_check_part(part, role, f"{where}, part {k}") for k, part in enumerate(content)]
        elif not isinstance(content, str):
            raise ValueError(f"{where} has a content of type {type(content).__name__}: use a string or a list of parts")
        texts = [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
        if (length := sum(map(len, texts))) > MAX_TEXT_LENGTH:
            raise ValueError(f"{where} holds {length} characters of text, but at most {MAX_TEXT_LENGTH} are tokenized")
        if image_token is not None and any(image_token in text for text in texts):
            raise ValueError(
                f"{where} holds the text {image_token!r}, which stands for an image: give images as parts of the type"
                " 'image', or pass sanitize_control_tokens=True to take it as text"
            )
        checked.append({**{key: value for key, value in message.items() if value is not None}, "content": content})
    if checked[-1]["role"] == "system":
        raise ValueError(f"{name}the conversation holds only a system message: it needs at least one from the user")
    return checked


def _check_part(part: dict, role: str, where: str) -> dict:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in PART_KEYS:
        raise ValueError(f"{where} must be a dict whose 'type' is 'text' or 'image', got {part!r:.80}")
    if kind == "text" and not isinstance(part.get("text"), str):
        raise ValueError(f"{where} has the type 'text', but its 'text' is {part.get('text')!r:.80}")
    if kind != "text" and role != "user":
        raise ValueError(f"{where} is an image in a message of the role {role!r}: only the user brings images")
    if kind == "image_url":  # OpenAI's form
        url = part.get("image_url")
        return {"type": "image", "url": url["url"] if isinstance(url, dict) else url}
    return {key: part[key] for key in ("type", *PART_KEYS[kind]) if part.get(key) is not None}


def list_images(conversation: list[dict]) -> list[ImageSource]:
    """The sources of the images of a conversation that was checked, in reading order."""
    parts = [part for message in conversation if not isinstance(message["content"], str) for part in message["content"]]
    return [part[next(key for key in PART_KEYS["image"] if key in part)] for part in parts if part["type"] == "image"]


def fill_images(example: dict, name: str) -> list[dict]:
    """
    The messages of an example, with its images put into the image parts that carry none, in reading order. An image may be
    what datasets' undecoded Image feature holds, a dict of `bytes` and `path`.
    """
    images = [undecoded(image) for image in example.get("images") or []]
    given = len(images)
    empty = 0
    messages = []
    for message in check_conversation(example.get("messages"), name=f"{name}: "):
        content = message["content"]
        if isinstance(content, list):
            filled = []
            for part in content:
                if part["type"] == "image" and all(part.get(key) is None for key in ("image", "url", "path", "base64")):
                    empty += 1
                    part = {"type": "image", "image": images.pop(0) if images else None}
                filled.append(part)
            content = filled
        messages.append({**message, "content": content})
    if empty != given:
        raise ValueError(f"{name}: {empty} image parts wait for an image, but `images` holds {given}")
    return messages


def undecoded(image: ImageSource | dict | None) -> ImageSource | None:
    """An image of an example, or what is in it if it is what datasets' undecoded Image feature holds."""
    if isinstance(image, dict):
        return image["path"] if image.get("bytes") is None else image["bytes"]
    return image
