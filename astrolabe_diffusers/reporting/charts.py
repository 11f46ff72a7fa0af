"""Pictures of a run, drawn with Pillow: reward curves, means, contact sheets, side-by-side videos and GIFs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from .videos import BLACK, WHITE, _font, _shorten


GRAY = (225, 225, 225)
COLORS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14), (23, 190, 207))


def nice_ticks(low: float, high: float, number: int = 6, smallest_step: float = 0.0) -> list[float]:
    """About `number` round values from `low` to `high`, a step being 1, 2 or 5 times a power of ten."""
    rough = max((high - low) / number, smallest_step)
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def draw_curves(
    curves: dict[str, Sequence[tuple[int, float]]],
    path: str | Path,
    title: str,
    x_label: str,
    y_label: str,
    size: tuple[int, int] = (800, 450),
):
    """Line chart as PNG: `curves` are `(x, y)` points by name, drawn in order with a mark at each if there are few.

    Points that are not finite are left out.
    """
    curves = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in curves.items()}
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return
    left, top, right, bottom = 75, 45, size[0] - 20, size[1] - 55
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = _with_margin([y for _, y in points])
    x_high = max(x_high, x_low + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x_low) / (x_high - x_low) * (right - left),
            bottom - (y - y_low) / (y_high - y_low) * (bottom - top),
        )

    image = Image.new("RGB", size, WHITE)
    draw = ImageDraw.Draw(image)
    for y in nice_ticks(y_low, y_high):
        _grid_line(draw, y, left, right, place(x_low, y)[1])
    for x in nice_ticks(x_low, x_high, 8, smallest_step=1):
        column = place(x, y_low)[0]
        draw.line([(column, bottom), (column, bottom + 5)], BLACK)
        draw.text((column, bottom + 8), f"{x:.4g}", BLACK, _font(), anchor="mt")
    draw.line([(left, top), (left, bottom), (right, bottom)], BLACK)
    draw.text((size[0] / 2, 8), title, BLACK, _font(16), anchor="mt")
    draw.text(((left + right) / 2, size[1] - 8), x_label, BLACK, _font(), anchor="mb")
    draw.text((8, 12), y_label, BLACK, _font(), anchor="lt")

    legend = right - 10
    for (name, curve), color in reversed(list(zip(curves.items(), COLORS))):
        placed = [place(*point) for point in curve]
        if len(placed) > 1:
            draw.line(placed, color, width=2, joint="curve")
        if len(placed) <= 30:
            for x, y in placed:
                draw.ellipse([x - 3, y - 3, x + 3, y + 3], color)
        legend -= draw.textlength(name, _font()) + 10
        draw.text((legend, top - 8), name, color, _font(), anchor="lb")
        legend -= 24
        draw.line([(legend, top - 15), (legend + 18, top - 15)], color, width=3)
    image.save(path, "PNG")


def draw_means(
    means: dict[str, Sequence[tuple[float, float]]],
    names: Sequence[str],
    path: str | Path,
    title: str,
    columns: int = 4,
    size: tuple[int, int] = (240, 210),
):
    """A small chart for each score as PNG, with its own scale: a mark at every mean, a line at that of the first.

    Args:
        means: by score, for each of `names` the mean and half the width of its interval, NaN where there is none.
        columns: charts in a row.
        size: width and height of a chart in pixels.
    """
    columns = min(columns, len(means))
    header, (width, height) = 62, size
    colors = list(zip(names, itertools.cycle(COLORS)))
    legend = [34 + _font().getlength(name) for name in names]
    total = math.ceil(max(columns * width + 10, _font(16).getlength(title) + 24, sum(legend)))
    image = Image.new("RGB", (total, header + math.ceil(len(means) / columns) * height), WHITE)
    draw = ImageDraw.Draw(image)
    draw.text((12, 10), title, BLACK, _font(16), anchor="lt")
    for (name, color), x in zip(colors, itertools.accumulate(legend, initial=12)):
        draw.ellipse([x, 38, x + 8, 46], color)
        draw.text((x + 14, 42), name, color, _font(), anchor="lm")
    for i, (score, marks) in enumerate(means.items()):
        corner = (i % columns) * width, header + i // columns * height
        left, top, right, bottom = corner[0] + 62, corner[1] + 28, corner[0] + width, corner[1] + height - 14
        ends = [y for mean, half in marks for y in (mean - half, mean, mean + half) if math.isfinite(y)]
        if not ends:
            continue
        low, high = _with_margin(ends)

        def place(y: float) -> float:
            return bottom - (y - low) / (high - low) * (bottom - top)

        for y in nice_ticks(low, high, number=5):
            _grid_line(draw, y, left, right, place(y))
        draw.line([(left, top), (left, bottom)], BLACK)
        # The end of a long name is what tells parts apart.
        text = _shorten(draw, score[::-1], width - 16)[::-1]
        draw.text((corner[0] + 12, corner[1] + 4), text, BLACK, _font(), anchor="lt")
        for k, ((mean, half), (_, color)) in enumerate(zip(marks, colors)):
            x = left + (k + 0.5) * (right - left) / len(marks)
            if not math.isfinite(mean):
                continue
            if k == 0:
                draw.line([(left, place(mean)), (right, place(mean))], color)
            if math.isfinite(half):
                draw.line([(x, place(mean - half)), (x, place(mean + half))], color, width=2)
                for end in (mean - half, mean + half):
                    draw.line([(x - 6, place(end)), (x + 6, place(end))], color, width=2)
            draw.ellipse([x - 5, place(mean) - 5, x + 5, place(mean) + 5], color)
    image.save(path, "PNG")


def _with_margin(values: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis with room around all `values`, also if they are equal."""
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or max(0.05 * abs(high), 0.01)
    return low - margin, high + margin


def _grid_line(draw: ImageDraw.ImageDraw, y: float, left: float, right: float, row: float):
    """A grid line at pixel `row`, with its value beside it."""
    draw.line([(left, row), (right, row)], GRAY)
    draw.text((left - 8, row), f"{y:.4g}", BLACK, _font(), anchor="rm")
