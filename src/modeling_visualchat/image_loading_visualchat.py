# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Images of any kind, as people see them: upright, 8-bit RGB, transparent parts on white. And on to pixel values.
"""

import base64
import io
import os
import re
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import BitImageProcessorPil, CLIPImageProcessorPil, SiglipImageProcessorPil
from transformers.image_utils import SizeDict
from transformers.image_utils import load_image as fetch_image
from transformers.utils import is_torchvision_available


KNOWN_IMAGE_PROCESSORS = (CLIPImageProcessorPil, SiglipImageProcessorPil, BitImageProcessorPil)
if is_torchvision_available():
    from transformers import BitImageProcessor, CLIPImageProcessor, SiglipImageProcessor

    KNOWN_IMAGE_PROCESSORS += (CLIPImageProcessor, SiglipImageProcessor, BitImageProcessor)
NUMPY_FLOATS = (torch.float16, torch.float32, torch.float64)
ORIENTATION = 0x0112  # the EXIF tag
LONGEST_PATH = 255  # characters: a longer string that is no file's path is taken for base64
# The names of schemes may be written in capitals
DATA_URL = re.compile(r"data:", re.IGNORECASE)
HTTP_URL = re.compile(r"(https?)(://.*)", re.IGNORECASE | re.DOTALL)
FILE_URL = re.compile(r"file://([^/]*)(.*)", re.IGNORECASE | re.DOTALL)
QUOTED = re.compile(rb"%([0-9a-f]{2})", re.IGNORECASE)
OTHER_URL = re.compile(r"[a-z][a-z0-9+.-]+(?=://)", re.IGNORECASE)  # no single letter, which is a drive of Windows
ImageSource = str | os.PathLike | bytes | Image.Image | np.ndarray | torch.Tensor


def load_image(source: ImageSource, name: str = "image") -> Image.Image:
    """
    Opens an image: whatever `transformers.image_utils.load_image` takes, and more.

    Args:
        source: A path (`~` is the home directory), an http(s), file or data URL, a base64 string (line breaks do not
            matter), encoded bytes, a PIL image, or an array of shape `(height, width)`, `(height, width, channels)` or
            `(channels, height, width)`, with 1, 3 or 4 channels, or a batch of one of these two: 8-bit or 16-bit unsigned
            integers, or floats from 0 to 1. Where both orders fit, such as `(3, 200, 1)`, a tensor of torch has its channels
            first and an array of NumPy has them last, as is the custom of each.
        name (`str`): What errors call the image.

    Returns:
        `PIL.Image.Image` in mode RGB, turned as its EXIF orientation says.

    Raises:
        ValueError: If the image cannot be read, has no pixels, or exceeds `PIL.Image.MAX_IMAGE_PIXELS`.
        FileNotFoundError: If the path does not exist.
        TypeError: If `source` is something else.
    """
    if isinstance(source, torch.Tensor):
        tensor = source.detach().cpu()
        if tensor.is_floating_point() and tensor.dtype not in NUMPY_FLOATS:
            tensor = tensor.float()
        return to_rgb(_from_array(tensor.numpy(), name, channels_first=True), name)
    if isinstance(source, np.ndarray):
        return to_rgb(_from_array(source, name, channels_first=False), name)
    if isinstance(source, Image.Image):
        image = source
    elif isinstance(source, str) and (url := HTTP_URL.match(source)):
        try:
            image = fetch_image(url[1].lower() + url[2])
        except Exception as error:  # whatever the network library of the day raises
            raise ValueError(f"{name}: cannot fetch {source}: {error}") from error
    elif isinstance(source, str | os.PathLike | bytes):
        image = _open(source, name)
    else:
        raise TypeError(f"{name}: expected a path, URL, bytes, PIL image or array, got {type(source).__name__}")
    if 0 in image.size:
        raise ValueError(f"{name}: the image has no pixels, its size is {image.width}×{image.height}")
    try:
        if image.getexif().get(ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name}: the image is broken: {error}") from error
    return to_rgb(image, name)


def load_own_image(source: ImageSource, name: str) -> Image.Image:
    """
    As [`load_image`], an image of our own: what the caller does to theirs later does not matter, and one that is read late
    is read now.
    """
    image = load_image(source, name)
    try:
        return image.copy()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{name}: the image is broken: {error}") from error


def find_path(source: str | os.PathLike) -> str | None:
    """
    The path that `source` names, `~` and file URLs resolved: whether or not there is such a file, but none for what can only
    be another URL, or base64.

    Raises:
        ValueError: If it is a URL of another machine's file, or of a scheme that is not read.
    """
    path = os.fspath(source)
    if os.path.isfile(path):  # whatever its name looks like
        return path
    if not isinstance(source, str):
        return os.path.expanduser(path)
    if DATA_URL.match(path) or HTTP_URL.match(path):
        return None
    if url := FILE_URL.match(path):
        host, rooted = url[1], url[2]
        if host.lower() not in ("", "localhost") or not rooted:
            raise ValueError(
                f"{path:.200} is not a file of this machine: a file URL is file:///path, its path from the root"
            )
        return os.fsdecode(QUOTED.sub(lambda found: bytes.fromhex(found[1].decode()), os.fsencode(rooted)))
    if scheme := OTHER_URL.match(path):
        raise ValueError(
            f"{path:.200}: nothing is read from {scheme[0]} URLs: give a path, or an http, https, file or data URL"
        )
    return os.path.expanduser(path) if len(path) <= LONGEST_PATH else None


def decode_base64(text: str) -> bytes:
    """
    What a data URL or a bare base64 string holds. Blanks and line breaks in it do not matter.

    Raises:
        ValueError: If it is not base64.
    """
    encoded = text.partition(",")[2] if DATA_URL.match(text) else text
    return base64.b64decode("".join(encoded.split()), validate=True)


def _open(source: str | os.PathLike | bytes, name: str) -> Image.Image:
    if isinstance(source, bytes):
        described, data = f"{len(source)} bytes", source
    else:
        try:
            path = find_path(source)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        described, data = str(path), None
        if path is None:
            described = "a base64 string"
            try:
                data = decode_base64(source)
            except ValueError as error:  # binascii's among them
                raise ValueError(f"{name}: neither a path nor valid base64 ({error}): {source[:60]}…") from error
        elif not os.path.isfile(path):
            described, data = "a base64 string", _decode_small_image(source)
            if data is None:
                raise FileNotFoundError(f"{name}: there is no file {path}")
        elif os.path.getsize(path) == 0:
            raise ValueError(f"{name}: {described} is empty")
    if data == b"":
        raise ValueError(f"{name}: {described}: the image is empty")

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data) if data is not None else path)
        image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{name}: {described} exceeds Pillow's limit of {Image.MAX_IMAGE_PIXELS} pixels, set by"
            f" PIL.Image.MAX_IMAGE_PIXELS: {error}"
        ) from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}: {described} is not an image that Pillow can read") from error
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow's decoders raise on broken data
        raise ValueError(f"{name}: {described} is a broken image: {error}") from error
    return image


def _decode_small_image(text: str | os.PathLike) -> bytes | None:
    """A base64 string as short as a path may be: an image if it begins as one, since most names are valid base64."""
    try:
        data = decode_base64(os.fspath(text))
        Image.open(io.BytesIO(data))
    except (OSError, SyntaxError, ValueError):
        return None
    return data


def _from_array(array: np.ndarray, name: str, channels_first: bool) -> Image.Image:
    shape = array.shape
    if array.ndim == 4 and shape[0] == 1:
        array = array[0]
    if array.ndim == 3:
        first, last = array.shape[0] in (1, 3, 4), array.shape[2] in (1, 3, 4)
        if first and (channels_first or not last):
            array = np.moveaxis(array, 0, -1)
        if array.shape[2] == 1:
            array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ValueError(
            f"{name}: an array must have the shape (height, width), (height, width, channels) or (channels, height,"
            f" width) with 1, 3 or 4 channels, got {shape}; give the images of a batch one by one"
        )
    if 0 in shape:
        raise ValueError(f"{name}: the image has no pixels, its shape is {shape}")
    if array.dtype == np.uint16:
        array = array / 65535
    elif array.dtype == bool:
        array = array.astype(np.float32)
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):
            raise ValueError(
                f"{name}: floats must lie between 0 and 1, got {array.min():g} to {array.max():g}; use uint8 for 0 to 255"
            )
        array = np.round(array * 255)
    elif array.min() < 0 or array.max() > 255:
        raise ValueError(f"{name}: integers must lie between 0 and 255, got {array.min()} to {array.max()}")
    return Image.fromarray(array.astype(np.uint8))


def to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """
    Converts any PIL mode to RGB: 16-bit is scaled rather than clipped, transparency is laid on white.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit and 32-bit grayscale
        values = np.asarray(image).astype(np.float64)
        if not (values.min() >= 0 and values.max() <= 65535):
            raise ValueError(f"{name}: grayscale must lie between 0 and 65535, got {values.min():g} to {values.max():g}")
        is_16_bit = image.mode.startswith("I;16") or values.max() > 255
        if image.mode == "F" and values.max() <= 1:
            values = values * 255
        return Image.fromarray(np.round(values / 257 if is_16_bit else values).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def clip_side(image_processor) -> int | None:
    """
    The side of the square, in pixels, that an image processor keeps of a resized image, and then crops or leaves as it is.
    CLIP's resizes the shorter edge (or both edges) to it; SigLIP's both edges; BiT's, which DINOv2 uses, the shorter edge,
    and crops a smaller square from its centre. `None` for other image processors, other steps and other sizes.
    """
    kind = type(image_processor)
    if kind not in (CLIPImageProcessorPil, SiglipImageProcessorPil, BitImageProcessorPil) or image_processor.do_pad:
        return None
    steps = ("do_resize", "do_rescale", "do_normalize")
    if not all(getattr(image_processor, step) for step in steps) or not isinstance(image_processor.resample, int):
        return None
    if bool(image_processor.do_center_crop) is (kind is SiglipImageProcessorPil):
        return None
    if kind is SiglipImageProcessorPil:
        side = image_processor.size.height
        return side if side and image_processor.size == SizeDict(height=side, width=side) else None
    cropped = image_processor.crop_size.height
    side = image_processor.size.shortest_edge if kind is BitImageProcessorPil else cropped
    square = SizeDict(height=cropped, width=cropped)
    if not side or side < cropped or (side - cropped) % 2 or image_processor.crop_size != square:
        return None  # an odd number of pixels would be cut off unevenly, in two steps not as in one
    is_usual = image_processor.size == SizeDict(shortest_edge=side) or (side == cropped and image_processor.size == square)
    return side if is_usual else None


def shorter_edge(image_processor) -> int | None:
    """
    The pixels to which an image processor of CLIP, SigLIP or BiT resizes the shorter edge of an image, whatever the other
    one becomes. `None` if it bounds both, and for other image processors.
    """
    if not isinstance(image_processor, KNOWN_IMAGE_PROCESSORS) or not image_processor.do_resize:
        return None
    return image_processor.size.shortest_edge if image_processor.size.longest_edge is None else None


def check_not_too_thin(size: tuple[int, int], edge: int | None, name: str = "") -> None:
    """
    Resizing the shorter edge of a thin image makes an enormous one of it.

    Args:
        size (`tuple[int, int]`): Width and height of the image.
        edge (`int`, *optional*): See [`shorter_edge`].
        name (`str`): What errors begin with.

    Raises:
        ValueError: If it would have more pixels than `PIL.Image.MAX_IMAGE_PIXELS`, which the image processor would fill in
            memory.
    """
    pixels = edge**2 * max(size) // min(size) if edge else 0
    if pixels > (limit := Image.MAX_IMAGE_PIXELS or pixels):
        raise ValueError(
            f"{name}An image of {size[0]}×{size[1]} pixels is too thin: with a shorter side of {edge} it would have"
            f" {pixels} pixels, more than Pillow's limit of {limit}"
        )


def crop_for_clip(image: Image.Image, image_processor, name: str = "") -> Image.Image:
    """
    The part of an RGB image that the image processor keeps, resized: to the bit what it computes, and what it would resize
    no more. Images for other image processors are returned unchanged; see [`clip_side`]. Errors begin with `name`.

    Raises:
        ValueError: See [`check_not_too_thin`].
    """
    check_not_too_thin(image.size, shorter_edge(image_processor), name)
    side = clip_side(image_processor)
    if side is None or image.size == (side, side):
        return image
    width = height = side
    if image_processor.size.shortest_edge:
        width, height = (int(side * edge / min(image.size)) for edge in image.size)
    if width > side:  # Pillow resizes the width of such an image first: what is cut off there needs no second pass
        left = (width - side) // 2
        image = image.resize((width, image.height), image_processor.resample).crop((left, 0, left + side, image.height))
    image = image.resize((side, height), image_processor.resample)
    top = (height - side) // 2
    return image if height == side else image.crop((0, top, side, top + side))  # `crop` copies


def clip_pixel_values(images: list[Image.Image], image_processor) -> torch.Tensor:
    """
    What the image processor makes of RGB images, to the bit: a value depends on nothing but its channel and its level
    from 0 to 255, so 768 values are computed and then looked up. The image processor must have a [`clip_side`].

    Returns:
        `torch.Tensor` of shape `(len(images), 3, side, side)` in float32.
    """
    kept = clip_side(image_processor)
    side = image_processor.crop_size.height if image_processor.do_center_crop else kept
    start = (kept - side) // 2
    levels = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
    levels = image_processor.rescale(levels, image_processor.rescale_factor)
    levels = image_processor.normalize(levels, image_processor.image_mean, image_processor.image_std)[:, 0]
    values = np.empty((len(images), 3, side, side), dtype=np.float32)
    for image, image_values in zip(images, values):
        pixels = np.asarray(crop_for_clip(image, image_processor))[start : start + side, start : start + side]
        for channel in range(3):
            np.take(levels[channel], pixels[..., channel], out=image_values[channel], mode="wrap")
    return torch.from_numpy(values)
