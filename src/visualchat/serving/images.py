# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""The images of a request: fetched from allowed hosts or read from `data:` URLs, checked, and decoded."""

import io

import anyio
from huggingface_hub.utils import httpx
from PIL import Image, UnidentifiedImageError

from modeling_visualchat.image_loading_visualchat import DATA_URL, crop_for_clip, decode_base64, load_image
from visualchat.serving.errors import RequestError, show
from visualchat.serving.limits import Limits


# Pillow reads many more formats, for some of which it starts other programs
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
# The image processor resizes the shorter edge to a fixed length, so a very thin image would become enormous
MAX_ASPECT_RATIO = 100
MAX_REDIRECTS = 3


def check_url(url: str, param: str, limits: Limits) -> None:
    """
    Raises:
        RequestError: If the URL is neither a data URL nor the URL of an allowed host.
    """
    if DATA_URL.match(url):
        return
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https"):
        raise RequestError(
            f"{param}: images must be data URLs (data:image/png;base64,…): this server reads no files, got {show(url)}",
            param,
            "invalid_image_url",
        )
    # `netloc` omits the port if it is the default one of the scheme
    if parsed.netloc.decode().lower() not in limits.hosts or parsed.userinfo:
        raise RequestError(
            f"{param}: this server does not fetch images from {show(parsed.host)}: send the image as a data URL"
            " (the operator of the server can allow hosts with --allow-host)",
            param,
            "invalid_image_url",
        )


async def fetch_image(url: str, param: str, limits: Limits) -> bytes:
    """
    Downloads an image from an allowed host. Redirects are followed if they lead to allowed hosts.

    Raises:
        RequestError: If the download fails or takes too long, or the image is too large.
    """
    first_url = url
    try:
        with anyio.fail_after(limits.fetch_seconds):
            # No compression: a small compressed response could expand to any size
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
        raise RequestError(f"{param}: cannot fetch {first_url:.200}: {reason}", param, "invalid_image_url") from error
    raise RequestError(
        f"{param}: {first_url:.200} was redirected more than {MAX_REDIRECTS} times", param, "invalid_image_url"
    )


def decode_data_url(url: str, param: str, limits: Limits) -> bytes:
    """
    Raises:
        RequestError: If the URL does not contain valid base64, or the image is too large.
    """
    head, _, encoded = url.partition(",")
    if not head.lower().endswith(";base64"):
        raise RequestError(
            f"{param}: a data URL must begin with data:image/png;base64, (or another image type), got {show(url)}",
            param,
            "invalid_base64",
        )
    check_size(len(encoded) * 3 // 4 - 2, param, limits)
    try:
        return decode_base64(url)
    except ValueError as error:  # includes binascii.Error
        raise RequestError(f"{param}: invalid base64: {error}", param, "invalid_base64") from error


def check_size(size: int, param: str, limits: Limits) -> None:
    if size > limits.image_bytes:
        raise RequestError(f"{param}: the image has more than {limits.image_bytes:,} bytes", param, "image_too_large")


def open_image(data: bytes, param: str, image_processor, limits: Limits) -> Image.Image:
    """
    Opens an image, and crops it to the part that the image processor keeps: see [`crop_for_clip`].

    Raises:
        RequestError: If the image cannot be read, has too many pixels or is too thin.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        raise RequestError(f"{param}: {error}", param, "image_too_large") from error
    except UnidentifiedImageError as error:
        kinds = ", ".join(IMAGE_FORMATS)
        raise RequestError(f"{param}: this is not a readable image: send {kinds}", param, "invalid_image") from error
    except Exception as error:  # the decoders of Pillow raise errors of many types
        raise RequestError(f"{param}: broken image: {error}", param, "invalid_image") from error
    width, height = image.size
    if width * height > limits.image_pixels:
        raise RequestError(
            f"{param}: the image has {width} × {height} pixels, more than {limits.image_pixels:,}",
            param,
            "image_too_large",
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise RequestError(
            f"{param}: the image has {width} × {height} pixels, one side more than {MAX_ASPECT_RATIO} times the other",
            param,
            "invalid_image",
        )
    try:
        image.load()
        image = load_image(image, param)
    except Exception as error:
        raise RequestError(f"{param}: broken image: {error}", param, "invalid_image") from error
    return crop_for_clip(image, image_processor)
