"""
Decodes what a viewer has sent. As a script it is a process of its own, which imports nothing of the package and has
bounded memory: a few bytes can make a decoder ask for gigabytes, or crash it, and that is the file's end alone.

    python decode_file.py MEDIA NUMBER < FILE

writes the first NUMBER frames, each as its width and height, 32 bits little endian, and its RGB bytes. On an error it
exits with 1 and a line on stderr.
"""

import io
import re
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from PIL import Image, ImageOps


MAX_MEMORY = 2**31
FRAME_HEADER = struct.Struct("<II")


def _check_pixels(width: int, height: int, most: int):
    if width * height > most:
        raise ValueError(f"{width}x{height} are more than {most} pixels.")


def _decode_picture(data: bytes, name: str, max_pixels: int) -> Iterator[Image.Image]:
    with Image.open(io.BytesIO(data), formats=[name]) as image:
        _check_pixels(*image.size, max_pixels)
        # As diffusers' `load_image`.
        yield ImageOps.exif_transpose(image).convert("RGB")


def _decode_video(data: bytes, name: str, max_pixels: int) -> Iterator[Image.Image]:
    # An extra.
    import av

    # The format is given, or ffmpeg would take playlists as well, which name other files.
    limit = {"max_pixels": str(max_pixels)}
    with av.open(io.BytesIO(data), format=name, options=limit) as container:
        if not container.streams.video:
            raise ValueError("it has sound alone.")
        stream, count = container.streams.video[0], 0
        context = stream.codec_context
        _check_pixels(context.width, context.height, max_pixels)
        # A frame that is broken is an error, not grey; and one file has one core.
        context.options = limit | {"err_detect": "explode"}
        context.thread_count = 1
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise ValueError("its end is missing.")
            for frame in packet.decode():
                count += 1
                yield frame.to_image().rotate(frame.rotation, expand=True)
        if count < stream.frames or (name == "matroska" and _is_cut(data)):
            raise ValueError("its end is missing.")
        if not count:
            raise ValueError("it has no frames.")


def _is_cut(data: bytes) -> bool:
    """Whether a Matroska file is shorter than its segment says, if that says it (RFC 8794, 4 and 5)."""
    end = 0
    for _ in ("EBML header", "segment"):
        start = end + 4  # after the identifier
        length = 9 - data[start].bit_length()
        size = int.from_bytes(data[start : start + length]) - (1 << 7 * length)
        end = start + length + size
    # All ones: it is not known, as while it is streamed.
    return size != (1 << 7 * length) - 1 and end > len(data)


@dataclass(frozen=True)
class Format:
    """How a file of this kind begins, and what reads it; `max_pixels` are those of a frame."""

    begins: re.Pattern[bytes]
    decode: Callable[[bytes, str, int], Iterator[Image.Image]]
    name: str
    max_pixels: int

    @property
    def is_picture(self) -> bool:
        return self.decode is _decode_picture


# By their media type. Photos of telephones, and 4K, are within the bounds.
FORMATS = {
    "image/jpeg": Format(re.compile(rb"\xff\xd8\xff"), _decode_picture, "JPEG", 2**25),
    "image/png": Format(re.compile(rb"\x89PNG\r\n\x1a\n"), _decode_picture, "PNG", 2**25),
    "image/webp": Format(re.compile(rb"(?s)RIFF.{4}WEBP"), _decode_picture, "WEBP", 2**25),
    "video/quicktime": Format(re.compile(rb"(?s).{4}ftypqt"), _decode_video, "mov", 2**23),
    "video/mp4": Format(re.compile(rb"(?s).{4}ftyp"), _decode_video, "mp4", 2**23),
    "video/webm": Format(re.compile(rb"\x1aE\xdf\xa3"), _decode_video, "matroska", 2**23),
}


def main(media: str, number: str):
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    format, data = FORMATS[media], sys.stdin.buffer.read()
    try:
        for frame in islice(format.decode(data, format.name, format.max_pixels), int(number)):
            sys.stdout.buffer.write(FRAME_HEADER.pack(*frame.size))
            sys.stdout.buffer.write(frame.tobytes())
        sys.stdout.buffer.flush()
    # Libraries have errors of all kinds for what is broken.
    except Exception as error:
        sys.exit(" ".join(str(error).split()) or type(error).__name__)


if __name__ == "__main__":
    main(*sys.argv[1:])
