# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Scenes: drawings of things, from a colour font, on a ground of one colour. A scene is described by data and rendered from
that, so the true answer to every question is known. Equal seeds give equal scenes.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw, ImageFont

from examples.pictures.kinds import Kind


GROUNDS = {
    "white": (255, 255, 255),
    "gray": (170, 170, 170),
    "red": (225, 120, 110),
    "orange": (250, 185, 110),
    "yellow": (250, 235, 140),
    "green": (150, 210, 140),
    "blue": (140, 185, 240),
    "purple": (195, 160, 225),
    "pink": (250, 190, 215),
    "brown": (175, 135, 100),
}
"""Colours of the ground, in sRGB. None is dark, since the drawings have black outlines."""

DRAWING_SIZE = 160
"""Side of the square that a drawing is rendered in, in pixels, before it is resized to its size in the scene."""


@dataclass(frozen=True)
class Thing:
    """A drawing in a scene. Center and size are fractions of the side of the image, and the angle is in degrees."""

    kind: Kind
    x: float
    y: float
    size: float
    angle: float


@dataclass(frozen=True)
class Scene:
    """A ground, by its name in `GROUNDS`, and the things on it, which do not overlap."""

    ground: str
    things: tuple[Thing, ...]


def draw_scene(scene: Scene, font: Path, size: int) -> Image.Image:
    """Renders a scene as a square RGB image with a side of `size` pixels."""
    image = Image.new("RGB", (size, size), GROUNDS[scene.ground])
    for thing in scene.things:
        side = round(thing.size * size)
        drawing = draw_kind(thing.kind.character, font).resize((side, side), Image.Resampling.LANCZOS)
        drawing = drawing.rotate(thing.angle, Image.Resampling.BICUBIC, expand=True)
        corner = (round(thing.x * size - drawing.width / 2), round(thing.y * size - drawing.height / 2))
        image.paste(drawing, corner, drawing)
    return image


@cache
def draw_kind(character: str, font: Path) -> Image.Image:
    """Renders a character as a square RGBA image, in the middle of it and as large as fits."""
    image = Image.new("RGBA", (2 * DRAWING_SIZE, 2 * DRAWING_SIZE))
    typeface = ImageFont.truetype(font, DRAWING_SIZE)
    ImageDraw.Draw(image).text((DRAWING_SIZE, DRAWING_SIZE), character, font=typeface, embedded_color=True, anchor="mm")
    drawing = image.crop(image.getbbox())
    side = max(drawing.size)
    square = Image.new("RGBA", (side, side))
    square.paste(drawing, ((side - drawing.width) // 2, (side - drawing.height) // 2))
    return square.resize((DRAWING_SIZE, DRAWING_SIZE), Image.Resampling.LANCZOS)


def make_scene(kinds: list[Kind], rng: Random) -> Scene:
    """
    Puts one to four things of these kinds at random positions: one alone is large, and of several each has a quarter of the
    image to itself. They stand in reading order, from the upper left to the lower right; two stand side by side.
    """
    if len(kinds) == 1:
        cells, side, size_range = [(0.5, 0.5)], 1.0, (0.6, 0.9)
    else:
        cells, side, size_range = [(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)], 0.5, (0.36, 0.46)
    chosen = sorted(rng.sample(range(len(cells)), len(kinds))) if len(kinds) != 2 else rng.choice([[0, 1], [2, 3]])
    things = []
    for kind, (x, y) in zip(kinds, (cells[index] for index in chosen)):
        size = rng.uniform(*size_range)
        free = (side - size) / 2
        angle = rng.uniform(-20, 20)
        things.append(Thing(kind, x + rng.uniform(-free, free), y + rng.uniform(-free, free), size, angle))
    return Scene(rng.choice(list(GROUNDS)), tuple(things))
