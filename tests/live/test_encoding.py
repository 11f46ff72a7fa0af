"""Frames as bytes and as files; what decodes them is not what encoded them."""

import io
import os
import struct

import av
import imageio.v3
import numpy as np
import pytest
from PIL import Image

from astrolabe_diffusers.live.encoding import Recorder, available_codecs, avc_string, make_encoder, pack_picture
from astrolabe_diffusers.live.session import MAX_SIDE, Block
from tests.training.helpers import full_disk


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


def test_a_recording_has_every_frame_once_and_in_order(tmp_path):
    frames = moving_square(30)
    recorder = Recorder(tmp_path / "a.mp4", 48, 64, 16, max_frames=1000)
    for start, end in ((0, 9), (9, 21), (21, 30)):
        recorder.write(frames[start:end])
    assert not (tmp_path / "a.mp4").exists()
    recorder.finish()
    video = imageio.v3.imread(tmp_path / "a.mp4")
    assert video.shape == frames.shape and imageio.v3.immeta(tmp_path / "a.mp4")["fps"] == 16
    # Where the square begins, counted from the left.
    dark = (video[:, 20].astype(int).sum(axis=-1) < 500).argmax(axis=1)
    assert abs(dark - (4 + np.arange(30))).max() <= 1


def test_a_recording_has_an_end(tmp_path):
    recorder = Recorder(tmp_path / "a.mp4", 48, 64, 16, max_frames=15)
    recorder.write(moving_square(12))
    assert not recorder.is_full
    recorder.write(moving_square(12))
    assert recorder.is_full
    recorder.finish()
    assert len(imageio.v3.imread(tmp_path / "a.mp4")) == 15


def test_of_a_recording_that_is_discarded_nothing_is_left(tmp_path):
    recorder = Recorder(tmp_path / "a.mp4", 48, 64, 16, max_frames=100)
    recorder.write(moving_square(12))
    recorder.discard()
    assert not os.listdir(tmp_path)
    Recorder(tmp_path / "b.mp4", 48, 64, 16, max_frames=100).discard()
    assert not os.listdir(tmp_path)


def test_a_full_disk_is_an_error(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (12, 48, 64, 3), dtype=np.uint8)
    recorder = Recorder(tmp_path / "a.mp4", 48, 64, 16, max_frames=10_000)
    with full_disk(4096), pytest.raises(OSError, match="is the disk full"):
        for _ in range(200):
            recorder.write(noise)
        recorder.finish()
    recorder.discard()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("codec", ["h264", "jpeg", "webp"])
@pytest.mark.parametrize("size", [(16, MAX_SIDE // 16 * 16), (MAX_SIDE // 16 * 16, 16)])
def test_the_longest_sides(codec, size):
    frames = np.full((2, *size, 3), 100, np.uint8)
    assert abs(decode(codec, make_encoder(codec, *size, 16).encode(frames)).astype(int) - frames).mean() < 5
