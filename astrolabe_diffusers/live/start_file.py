"""The picture or video that a viewer's video starts from: the file as it was sent, checked, and its frames."""

import base64
import importlib.util
import io
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from PIL import Image

from . import decode_file
from .decode_file import FORMATS, FRAME_HEADER


MAX_BYTES = 2**23
# As many as the published models' videos have.
MAX_FRAMES = 81
# That it may take to decode a file: 81 frames of 4K take 7 s of a core that has nothing else to do.
MAX_SECONDS = 60.0
_THUMBNAIL_PIXELS = 160


def available_media(pictures: bool) -> list[str]:
    """The media types that this installation reads, with `pictures` or without."""
    video = importlib.util.find_spec("av") is not None
    return [media for media, format in FORMATS.items() if (pictures if format.is_picture else video)]


@dataclass(frozen=True)
class StartFile:
    """
    A file that [`StartFile.read`] has checked.

    Attributes:
        data: the file.
        media: its type, a key of `FORMATS`.
        num_frames: that it has, or `MAX_FRAMES` if it has more, which are not read.
        thumbnail: the first one, small, as a data URI.
    """

    data: bytes
    media: str
    num_frames: int
    thumbnail: str

    @classmethod
    def read(cls, data: bytes) -> Self:
        """Decodes it, in a process of its own.

        Raises:
            ValueError: it is too large, of another format, has too many pixels, is not whole or takes too long.
        """
        if len(data) > MAX_BYTES:
            raise ValueError(f"a file to start from has at most {MAX_BYTES} bytes, not {len(data)}.")
        media = next((media for media, format in FORMATS.items() if format.begins.match(data)), None)
        if media is None:
            raise ValueError(f"a file to start from is one of {', '.join(FORMATS)}, and this is none of them.")
        num_frames, buffer = 0, io.BytesIO()
        for frame in _decode(data, media, MAX_FRAMES):
            if num_frames == 0:
                frame.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
                frame.save(buffer, "JPEG")
            num_frames += 1
        return cls(data, media, num_frames, _data_uri("image/jpeg", buffer.getvalue()))

    @classmethod
    def from_uri(cls, uri: Any) -> Self:
        """Of [`StartFile.uri`]; see [`StartFile.read`]."""
        head, _, text = uri.partition(",") if isinstance(uri, str) else ("", "", "")
        if not re.fullmatch("data:[a-z0-9/]+;base64", head):
            raise ValueError("start_frames must be a data URI in base64.")
        return cls.read(base64.b64decode(text, validate=True))

    @property
    def is_picture(self) -> bool:
        return FORMATS[self.media].is_picture

    # Once: all records of its sessions share it.
    @cached_property
    def uri(self) -> str:
        """The file as it was sent, as a data URI."""
        return _data_uri(self.media, self.data)

    def frames(self, number: int, resize: Callable[[Image.Image], Image.Image]) -> list[Image.Image]:
        """The first `number` ones, RGB. Each goes through `resize` as it comes: there is one large one at a time."""
        with closing(_decode(self.data, self.media, number)) as frames:
            return [resize(frame) for frame in frames]


def _decode(data: bytes, media: str, number: int) -> Iterator[Image.Image]:
    # -P: modules beside the script are none that it means.
    command = [sys.executable, "-P", decode_file.__file__, media, str(number)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        timer = threading.Timer(MAX_SECONDS, process.kill)
        timer.start()
        try:
            with suppress(BrokenPipeError):  # it says on stderr why it reads no more
                process.stdin.write(data)
                process.stdin.flush()
            with suppress(BrokenPipeError):
                process.stdin.close()
            while len(header := process.stdout.read(FRAME_HEADER.size)) == FRAME_HEADER.size:
                width, height = FRAME_HEADER.unpack(header)
                pixels = process.stdout.read(3 * width * height)
                if len(pixels) < 3 * width * height:
                    break
                yield Image.frombytes("RGB", (width, height), pixels)
            lines = process.stderr.read().decode(errors="replace").splitlines()
            if process.wait():
                late = timer.finished.is_set()
                reason = f"it takes more than {MAX_SECONDS:g} s." if late else (lines or ["its decoder crashed."])[-1]
                raise ValueError(f"this {media} cannot be used: {reason}")
        finally:
            timer.cancel()
            process.kill()


def _data_uri(media: str, data: bytes) -> str:
    return f"data:{media};base64,{base64.b64encode(data).decode()}"
