"""Frames as bytes that browsers decode."""

import importlib.util
import io
import struct
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import numpy as np
from PIL import Image

from .config import CODECS
from .session import Block


# Version, lane, block, frame; then the picture.
HEADER = struct.Struct("<BBxxII")
PROTOCOL_VERSION = 1


class ImageEncoder:
    """Every frame by itself, by Pillow."""

    codec_string = None

    def __init__(self, **options):
        self.options = options

    def encode(self, frames: np.ndarray) -> Iterator[bytes]:
        """Of frames `(F, H, W, 3)`, uint8, each when it is asked for."""
        for frame in frames:
            buffer = io.BytesIO()
            Image.fromarray(frame).save(buffer, **self.options)
            yield buffer.getvalue()


class H264Encoder:
    """
    H.264 of constrained baseline profile by PyAV's x264, in Annex B: one access unit a frame and no delay. Every call
    begins with a key frame and its parameter sets, so that a call that gets lost leaves nothing behind.

    Args:
        height, width: in pixels, even numbers.
        frame_rate: that the bits are rationed for.
    """

    def __init__(self, height: int, width: int, frame_rate: float):
        # An extra, and it costs a moment.
        import av

        self._av = av
        context = self._context = av.CodecContext.create("libx264", "w")
        context.width, context.height, context.pix_fmt = width, height, "yuv420p"
        context.framerate = Fraction(frame_rate).limit_denominator(1000)
        context.time_base = 1 / context.framerate
        # The encoder is called from a pool with threads of its own.
        context.thread_count = 1
        context.options = {
            "preset": "superfast",
            "tune": "zerolatency",
            "profile": "baseline",
            "crf": "20",
            "forced-idr": "1",
            # Browsers take BT.601 or 709 by the size of a picture, unless it is said.
            "x264-params": "colorprim=bt709:transfer=bt709:colormatrix=bt709:fullrange=off",
        }
        self._num_frames = 0
        self.codec_string: str | None = None

    def encode(self, frames: np.ndarray) -> Iterator[bytes]:
        """Of frames `(F, H, W, 3)`, uint8, each when it is asked for."""
        for i, frame in enumerate(frames):
            picture = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture = picture.reformat(
                format="yuv420p",
                src_colorspace=self._av.video.reformatter.Colorspace.ITU709,
                dst_colorspace=self._av.video.reformatter.Colorspace.ITU709,
                dst_color_range=self._av.video.reformatter.ColorRange.MPEG,
            )
            picture.pts = self._num_frames
            picture.pict_type = self._av.video.frame.PictureType.I if i == 0 else self._av.video.frame.PictureType.NONE
            self._num_frames += 1
            (packet,) = self._context.encode(picture)
            data = bytes(packet)
            self.codec_string = self.codec_string or avc_string(data)
            yield data


def avc_string(access_unit: bytes) -> str:
    """The name, `avc1.PPCCLL`, of what a sequence parameter set in Annex B says of profile and level (RFC 6381)."""
    parts = access_unit.split(b"\0\0\1")
    parameters = next(part for part in parts if part and part[0] & 0x1F == 7)
    return f"avc1.{parameters[1:4].hex()}"


Encoder = ImageEncoder | H264Encoder
_ENCODERS: dict[str, Callable[[int, int, float], Encoder]] = {
    # Colours in full resolution: edges of red on white stay what they are.
    "jpeg": lambda *size: ImageEncoder(format="JPEG", quality=90, subsampling=0),
    "webp": lambda *size: ImageEncoder(format="WEBP", quality=80, method=0),
    "h264": H264Encoder,
}


def available_codecs(codecs: Sequence[str] = CODECS) -> list[str]:
    """Those of them that this installation has."""
    return [codec for codec in codecs if codec != "h264" or importlib.util.find_spec("av")]


def make_encoder(codec: str, height: int, width: int, frame_rate: float) -> Encoder:
    encoder = _ENCODERS[codec](height, width, frame_rate)
    # So that its name is known before the first block, and the first call of a library is over.
    next(encoder.encode(np.zeros((1, height, width, 3), np.uint8)))
    return encoder


def pack_picture(block: Block, frame: int, picture: bytes) -> bytes:
    """A message with the picture of a frame of a block."""
    return HEADER.pack(PROTOCOL_VERSION, block.lane, block.number, frame) + picture
