"""The world of the embedded model, one to three coloured shapes that move over a plain background; its captions."""

import re
from typing import NamedTuple

import torch


# RGB in [0, 1]. Any two differ by at least 0.45 (Euclidean), an object and its background by at least 0.57.
COLORS = {
    "red": (0.90, 0.05, 0.10),
    "green": (0.05, 0.70, 0.20),
    "blue": (0.10, 0.20, 0.95),
    "yellow": (1.00, 0.95, 0.10),
    "purple": (0.70, 0.00, 0.85),
    "orange": (1.00, 0.50, 0.00),
}
SHAPES = ("circle", "square", "triangle", "cross")
# Unit vectors (x, y) of the image plane: x to the right, y down.
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
BACKGROUNDS = {"black": (0.0, 0.0, 0.0), "white": (1.0, 1.0, 1.0), "gray": (0.5, 0.5, 0.5), "blue": COLORS["blue"]}
MAX_OBJECTS = 3


class Object(NamedTuple):
    color: str
    shape: str
    direction: str


class Scene(NamedTuple):
    """What a caption says: one to three objects, each of a colour that no other and not the background has."""

    objects: tuple[Object, ...]
    background: str


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def caption(scene: Scene) -> str:
    """ "a red circle moves left, an orange square moves up and a blue cross moves down on a white background"."""
    objects = [f"{_article(o.color)} {o.color} {o.shape} moves {o.direction}" for o in scene.objects]
    listed = " and ".join(filter(None, [", ".join(objects[:-1]), objects[-1]]))
    return f"{listed} on {_article(scene.background)} {scene.background} background"


_OBJECT = re.compile(rf"an? ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) moves ({'|'.join(DIRECTIONS)})")
_CAPTION = re.compile(rf"(.+) on a ({'|'.join(BACKGROUNDS)}) background\.?")


def parse_caption(prompt: str) -> Scene:
    """The scene that a caption describes; `ValueError` in one line if it is none of tiny_shapes."""
    whole = _CAPTION.fullmatch(" ".join(prompt.lower().split()))
    parts = re.split(r", and |, | and ", whole[1]) if whole else []
    objects = [_OBJECT.fullmatch(part) for part in parts]
    if not objects or not all(objects) or len(objects) > MAX_OBJECTS:
        form = caption(Scene((Object("COLOR", "SHAPE", "DIRECTION"),), "BACKGROUND"))
        choices = {"color": COLORS, "shape": SHAPES, "direction": DIRECTIONS, "background": BACKGROUNDS}
        words = "; ".join(f"{name} {' '.join(values)}" for name, values in choices.items())
        raise ValueError(
            f"{prompt!r} is no tiny_shapes caption; the form is {form!r}, up to {MAX_OBJECTS} objects joined by ',' "
            f"and 'and', with {words}."
        )
    scene = Scene(tuple(Object(*match.groups()) for match in objects), whole[2])
    colors = [o.color for o in scene.objects] + [scene.background]
    if len(set(colors)) < len(colors):
        raise ValueError(f"{prompt!r} is no tiny_shapes caption: its objects and its background differ in colour.")
    return scene


def shortest(way: torch.Tensor, size: int | torch.Tensor) -> torch.Tensor:
    """Ways along an axis of `size` whose ends meet, each by the shorter side: in [-size / 2, size / 2)."""
    return (way + size / 2).remainder(size) - size / 2


def offsets(size: int, position: torch.Tensor) -> torch.Tensor:
    """[..., size]: how far the pixels of an axis whose ends meet are from each `position` [...]."""
    pixels = torch.arange(size, dtype=position.dtype, device=position.device) + 0.5
    return shortest(pixels - position[..., None], size)


def shape_mask(
    shape: torch.Tensor, center: torch.Tensor, radius: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """
    Draws shapes on a plane whose opposite borders meet: [N, height, width] in [0, 1], antialiased.

    Args:
        shape: long tensor [N], indices into `SHAPES`.
        center: float tensor [N, 2], the centroid (x, y) in pixels; pixel i covers [i, i + 1).
        radius: float tensor [N] in pixels: of the circle; the other shapes have about the same area.
    """
    x, y = offsets(width, center[:, 0])[:, None, :], offsets(height, center[:, 1])[:, :, None]
    ax, ay, r = x.abs(), y.abs(), radius[:, None, None]
    # Signed distance to the outline, negative inside.
    distances = (
        (x.square() + y.square()).sqrt() - r,
        torch.maximum(ax, ay) - 0.89 * r,
        # Equilateral, tip up; the circumradius is twice the distance of a side from the centroid.
        torch.maximum(y, 0.75**0.5 * ax - 0.5 * y) - 0.7 * r,
        torch.minimum(torch.maximum(ax - 1.15 * r, ay - 0.38 * r), torch.maximum(ax - 0.38 * r, ay - 1.15 * r)),
    )
    shape = shape[:, None, None]
    distance = distances[0]
    for index in range(1, len(SHAPES)):
        distance = torch.where(shape == index, distances[index], distance)
    return (0.5 - distance).clamp_(0, 1)
