"""Frames as bytes; what decodes them is not what encoded them."""

import struct

import numpy as np
import pytest

from astrolabe_diffusers.live.encoding import available_codecs, avc_string, make_encoder, pack_picture
from astrolabe_diffusers.live.session import MAX_SIDE, Block
from tests.live.pictures import decode, moving_square


@pytest.mark.parametrize("codec", ["h264", "jpeg", "webp"])
def test_every_frame_comes_back_in_order(codec):
    frames = moving_square(24)
    encoder = make_encoder(codec, 48, 64, 16)
    packets = [list(encoder.encode(frames[:12])), list(encoder.encode(frames[12:]))]
    assert [len(part) for part in packets] == [12, 12]
    decoded = decode(codec, packets[0] + packets[1])
    assert decoded.shape == frames.shape
    assert abs(decoded.astype(int) - frames).mean() < 6
    inside = decoded[:, 16:24, :][np.arange(24)[:, None], :, 10 + np.arange(24)[:, None]]
    assert abs(inside.mean(axis=(0, 1)) - (230, 30, 40)).max() < 12  # by another matrix red would not be this red


def test_a_call_of_h264_needs_none_before_it():
    encoder = make_encoder("h264", 48, 64, 16)
    list(encoder.encode(moving_square(12)))
    later = moving_square(9, start=20)
    packets = list(encoder.encode(later))
    assert abs(decode("h264", packets).astype(int) - later).mean() < 6
    assert encoder.codec_string.startswith("avc1.42") and len(encoder.codec_string) == 11


def test_the_name_of_a_profile():
    """The parameter sets of RFC 6381's example: baseline, 3.0."""
    assert avc_string(bytes.fromhex("0000000109f000000001" + "6742e01eda" + "000001" + "68ce")) == "avc1.42e01e"


def test_a_message_has_its_picture():
    message = pack_picture(Block(1, 300, 3597, np.zeros((12, 2, 2, 3), np.uint8), 0.1, 0.5), 3600, b"picture")
    assert struct.unpack("<BB2sII", message[:12]) == (1, 1, b"\0\0", 300, 3600) and message[12:] == b"picture"


def test_codecs_that_are_not_there(monkeypatch):
    assert available_codecs(["webp", "h264"]) == ["webp", "h264"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert available_codecs(["webp", "h264"]) == ["webp"]


@pytest.mark.parametrize("codec", ["h264", "jpeg", "webp"])
@pytest.mark.parametrize("size", [(16, MAX_SIDE // 16 * 16), (MAX_SIDE // 16 * 16, 16)])
def test_the_longest_sides(codec, size):
    frames = np.full((2, *size, 3), 100, np.uint8)
    assert abs(decode(codec, make_encoder(codec, *size, 16).encode(frames)).astype(int) - frames).mean() < 5
