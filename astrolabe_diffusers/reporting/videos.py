"""Videos as files, side by side, in contact sheets and as GIFs."""

import io
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..files.video import VideoWriter
from ..files.writing import replacing, writing
from ..rewards.frames import to_uint8


WHITE, BLACK = (255, 255, 255), (30, 30, 30)


def video_images(video: torch.Tensor, size: tuple[int, int] | None = None) -> list[Image.Image]:
    """The frames of a video `(F, 3, H, W)` in [0, 1], resized to `size` (width, height) if given."""
    frames = to_uint8(video).permute(0, 2, 3, 1).cpu().numpy()
    images = [Image.fromarray(frame) for frame in frames]
    if size is None or images[0].size == size:
        return images
    # Enlarging keeps the pixels visible as they are.
    method = Image.Resampling.NEAREST if size[0] > images[0].width else Image.Resampling.LANCZOS
    return [image.resize(size, method) for image in images]


def gif_bytes(images: Sequence[Image.Image], frame_rate: float) -> bytes:
    """An endless animated GIF."""
    buffer = io.BytesIO()
    images[0].save(
        buffer, "GIF", save_all=True, append_images=images[1:], duration=round(1000 / frame_rate), loop=0, disposal=2
    )
    return buffer.getvalue()


def small_gif_bytes(images: Sequence[Image.Image], frame_rate: int, max_width: int = 640) -> bytes:
    """An animated GIF of a few megabytes at most: no wider than `max_width`, 8 frames/s or fewer, same pace."""
    stride = math.ceil(frame_rate / 8)
    scale = min(max_width / images[0].width, 1)
    size = round(images[0].width * scale), round(images[0].height * scale)
    small = [image.resize(size, Image.Resampling.LANCZOS) for image in images[::stride]]
    return gif_bytes(small, frame_rate / stride)


def side_by_side(videos: Sequence[torch.Tensor], columns: int) -> list[Image.Image]:
    """Frames of one video with several `(F, 3, H, W)` next to each other, in rows of `columns`."""
    size = _tile_size(videos[0], 128, 416)
    tiles = [[ImageOps.expand(image, 2, WHITE) for image in video_images(video, size)] for video in videos]
    tiles += [[Image.new("RGB", tiles[0][0].size, WHITE)] * len(tiles[0])] * (-len(tiles) % columns)
    return [make_image_grid(list(images), len(tiles) // columns, columns) for images in zip(*tiles)]


def comparison_video(columns: dict[str, Sequence[torch.Tensor]]) -> list[Image.Image]:
    """Frames of a video with the same videos of every column next to each other, under its name, at a size that any
    player takes. A row has as many of these groups as give about four videos."""
    groups = list(zip(*columns.values()))
    per_row = len(columns) * min(math.ceil(4 / len(columns)), len(groups))
    grid = side_by_side([video for group in groups for video in group], per_row)
    tile = grid[0].width // per_row
    frames = []
    for image in grid:
        width, height = (math.ceil(n / 16) * 16 for n in (image.width, image.height + 24))
        frame = Image.new("RGB", (width, height), WHITE)
        draw = ImageDraw.Draw(frame)
        for i, name in zip(range(per_row), itertools.cycle(columns)):
            _write(draw, (i * tile + tile / 2, 12), name, tile - 8)
        frame.paste(image, (0, 24))
        frames.append(frame)
    return frames


def contact_sheet(columns: dict[str, Sequence[torch.Tensor]], captions: Sequence[str]) -> Image.Image:
    """A row a caption: four frames of its video in every column."""
    groups = list(zip(*columns.values()))
    width, height = _tile_size(groups[0][0], 96, 208)
    indices = [round(i * (len(groups[0][0]) - 1) / 3) for i in range(4)]
    column, row, header, gap = len(indices) * (width + 2), height + 26, 30, 16
    sheet = Image.new("RGB", (len(columns) * (column + gap) + 16 - gap, header + row * len(groups) + 8), WHITE)
    draw = ImageDraw.Draw(sheet)
    for c, name in enumerate(columns):
        _write(draw, (8 + c * (column + gap) + column / 2, header / 2), name, column, size=16)
    for r, (group, caption) in enumerate(zip(groups, captions)):
        top = header + r * row
        _write(draw, (8, top + 2), caption, sheet.width - 16, anchor="lt")
        for c, video in enumerate(group):
            for i, image in enumerate(video_images(video[indices], (width, height))):
                sheet.paste(image, (8 + c * (column + gap) + i * (width + 2), top + 22))
    return sheet


def _tile_size(video: torch.Tensor, low: int, high: int) -> tuple[int, int]:
    """Width and height of a tile: small videos are enlarged by a whole number, large ones reduced."""
    height, width = video.shape[-2:]
    if width > high:
        return high, round(high * height / width)
    factor = math.ceil(low / width)
    return width * factor, height * factor


def _write(draw: ImageDraw.ImageDraw, place: tuple, text: str, width: int, size: int = 14, anchor: str = "mm"):
    """Writes as much of a text as the width holds."""
    font = ImageFont.load_default(size)
    if draw.textlength(text, font) > width:
        while text and draw.textlength(text + " ...", font) > width:
            text = text[:-1]
        text += " ..."
    draw.text(place, text, BLACK, font, anchor=anchor)


def save_video(video: torch.Tensor, path: Path, frame_rate: int):
    """Writes a video `(F, 3, H, W)` in [0, 1] as MP4."""
    write_frames((video.permute(0, 2, 3, 1).numpy() * 255).astype(np.uint8), path, frame_rate)


def write_frames(frames: np.ndarray, path: Path, frame_rate: int):
    """Writes `frames` `(F, H, W, 3)`, uint8, as MP4; a [`UserError`] if they cannot be written."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with VideoWriter(path, *frames.shape[1:3], frame_rate) as writer:
            writer.write(frames)


def write_columns(
    columns: dict[str, list[torch.Tensor]], prompts: Sequence[str], path: Path, frame_rate: int
) -> list[str]:
    """Writes what [`generate_columns`] returns side by side: a video `path.mp4`, frames of it in a contact sheet
    `path.png`, and the video in small as `path.gif`. Returns the paths of these files."""
    files = [f"{path}.mp4", f"{path}.png", f"{path}.gif"]
    images = comparison_video(columns)
    write_frames(np.stack(images), Path(files[0]), frame_rate)
    with replacing(Path(files[1])) as partial:
        contact_sheet(columns, prompts).save(partial, "PNG")
    with replacing(Path(files[2])) as partial:
        partial.write_bytes(small_gif_bytes(images, frame_rate))
    return files
