"""Frames that move, and a decoder of what is sent of them."""

import io

import av
import numpy as np
from PIL import Image


def moving_square(number, height=48, width=64, start=0):
    """A red square that moves right over white."""
    frames = np.full((number, height, width, 3), 255, np.uint8)
    for i in range(number):
        frames[i, 12:28, 4 + start + i : 20 + start + i] = (230, 30, 40)
    return frames


def decode(codec, packets):
    if codec != "h264":
        images = [Image.open(io.BytesIO(packet)) for packet in packets]
        assert {image.format for image in images} == {codec.upper()}
        return np.stack([np.asarray(image.convert("RGB")) for image in images])
    decoder = av.CodecContext.create("h264", "r")
    frames = [frame for packet in packets for frame in decoder.decode(av.Packet(packet))]
    frames += decoder.decode(None)
    assert {int(frame.colorspace) for frame in frames} == {1}  # BT.709, as the stream says
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
