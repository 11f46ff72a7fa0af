"""Pictures of a run, drawn with Pillow: reward curves, contact sheets, before/after videos and GIFs."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont


WHITE, BLACK, GRAY = (255, 255, 255), (30, 30, 30), (225, 225, 225)
COLORS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189))
FONT_SIZE = 14


def _font(size: int = FONT_SIZE):
    return ImageFont.load_default(size)


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
    y_low, y_high = min(y for _, y in points), max(y for _, y in points)
    x_high = max(x_high, x_low + 1)
    margin = 0.08 * (y_high - y_low) or max(0.05 * abs(y_high), 0.01)
    y_low, y_high = y_low - margin, y_high + margin

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x_low) / (x_high - x_low) * (right - left),
            bottom - (y - y_low) / (y_high - y_low) * (bottom - top),
        )

    image = Image.new("RGB", size, WHITE)
    draw = ImageDraw.Draw(image)
    for y in nice_ticks(y_low, y_high):
        level = place(x_low, y)[1]
        draw.line([(left, level), (right, level)], GRAY)
        draw.text((left - 8, level), f"{y:.4g}", BLACK, _font(), anchor="rm")
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
    image.save(path)


def video_images(video: torch.Tensor, size: tuple[int, int] | None = None) -> list[Image.Image]:
    """The frames of a video `(F, 3, H, W)` in [0, 1], resized to `size` (width, height) if given."""
    frames = (video.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    images = [Image.fromarray(frame) for frame in frames]
    if size is None or images[0].size == size:
        return images
    # Enlarging keeps the pixels visible as they are.
    method = Image.Resampling.NEAREST if size[0] > images[0].width else Image.Resampling.LANCZOS
    return [image.resize(size, method) for image in images]


def gif_bytes(images: Sequence[Image.Image], frame_rate: int) -> bytes:
    """An endless animated GIF."""
    buffer = io.BytesIO()
    images[0].save(
        buffer, "GIF", save_all=True, append_images=images[1:], duration=round(1000 / frame_rate), loop=0, disposal=2
    )
    return buffer.getvalue()


def side_by_side(videos: Sequence[torch.Tensor], columns: int | None = None) -> list[Image.Image]:
    """Frames of one video with several `(F, 3, H, W)` next to each other, in rows of `columns`."""
    columns = columns or len(videos)
    size = _tile_size(videos[0], 128, 416)
    tiles = [video_images(video, size) for video in videos]
    rows = math.ceil(len(tiles) / columns)
    frames = []
    for t in range(len(tiles[0])):
        frame = Image.new("RGB", (columns * (size[0] + 4), rows * (size[1] + 4)), WHITE)
        for i, tile in enumerate(tiles):
            frame.paste(tile[t], ((i % columns) * (size[0] + 4) + 2, (i // columns) * (size[1] + 4) + 2))
        frames.append(frame)
    return frames


def before_after_video(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor], pairs_per_row: int = 2):
    """Frames of a video with every pair `before | after`, under headings, at a size that any player takes."""
    pairs_per_row = min(pairs_per_row, len(before))
    grid = side_by_side([video for pair in zip(before, after) for video in pair], 2 * pairs_per_row)
    tile = grid[0].width // (2 * pairs_per_row)
    frames = []
    for image in grid:
        width, height = (math.ceil(n / 16) * 16 for n in (image.width, image.height + 24))
        frame = Image.new("RGB", (width, height), WHITE)
        draw = ImageDraw.Draw(frame)
        for i in range(2 * pairs_per_row):
            draw.text((i * tile + tile / 2, 12), "after" if i % 2 else "before", BLACK, _font(), anchor="mm")
        frame.paste(image, (0, 24))
        frames.append(frame)
    return frames


def contact_sheet(
    before: Sequence[torch.Tensor], after: Sequence[torch.Tensor], captions: Sequence[str], num_frames: int = 4
) -> Image.Image:
    """A row a pair: `num_frames` frames of the video before and of that after, under its caption."""
    width, height = _tile_size(before[0], 96, 208)
    indices = [round(i * (len(before[0]) - 1) / max(num_frames - 1, 1)) for i in range(num_frames)]
    half, row, header, gap = num_frames * (width + 2), height + 26, 30, 16
    sheet = Image.new("RGB", (2 * half + gap + 16, header + row * len(before) + 8), WHITE)
    draw = ImageDraw.Draw(sheet)
    for side, title in enumerate(("before", "after")):
        draw.text((8 + side * (half + gap) + half / 2, header / 2), title, BLACK, _font(16), anchor="mm")
    for r, (pair, caption) in enumerate(zip(zip(before, after), captions)):
        top = header + r * row
        draw.text((8, top + 2), _shorten(draw, caption, sheet.width - 16), BLACK, _font(), anchor="lt")
        for side, video in enumerate(pair):
            for i, image in enumerate(video_images(video[indices], (width, height))):
                sheet.paste(image, (8 + side * (half + gap) + i * (width + 2), top + 22))
    return sheet


def _tile_size(video: torch.Tensor, low: int, high: int) -> tuple[int, int]:
    """Width and height of a tile: small videos are enlarged by a whole number, large ones reduced."""
    height, width = video.shape[-2:]
    if width > high:
        return high, round(high * height / width)
    factor = math.ceil(low / width)
    return width * factor, height * factor


def _shorten(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    if draw.textlength(text, _font()) <= width:
        return text
    while text and draw.textlength(text + " ...", _font()) > width:
        text = text[:-1]
    return text + " ..."
