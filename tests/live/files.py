"""Files that a video may start from, written by Pillow and ffmpeg."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image


def shades(number: int, height: int = 24, width: int = 40) -> list[Image.Image]:
    """Pictures that differ from each other, and from corner to corner."""
    y, x = np.mgrid[:height, :width]
    channels = [np.stack([y * 9, x * 6, (y + x + i * 40) * 2], -1) % 256 for i in range(number)]
    return [Image.fromarray(picture.astype(np.uint8)) for picture in channels]


def picture_file(format: str = "PNG", picture: Image.Image | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    (picture or shades(1)[0]).save(buffer, format, **options)
    return buffer.getvalue()


def ffmpeg(*words):
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, words)], check=True)


def video_file(path: Path, number: int = 25, height: int = 24, width: int = 40, *words: str) -> Path:
    """A video of `number` frames; `words` are further ones for ffmpeg, for its output."""
    source = f"testsrc=size={width}x{height}:rate=16"
    ffmpeg("-f", "lavfi", "-i", source, "-frames:v", number, "-pix_fmt", "yuv420p", *words, path)
    return path
