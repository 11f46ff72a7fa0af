"""Files of viewers: their frames are those that others read of them, and what is wrong with one is said in a line."""

import base64
import io
import struct
import textwrap
import zlib
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import psutil
import pytest
from diffusers.utils import load_image
from PIL import Image

from astrolabe_diffusers.live import start_file as start_file_module
from astrolabe_diffusers.live.start_file import MAX_BYTES, MAX_FRAMES, StartFile, available_media
from tests.live.files import ffmpeg, picture_file, shades, video_file


def frames_of(data: bytes, number: int = MAX_FRAMES) -> np.ndarray:
    return np.stack([np.asarray(frame) for frame in StartFile.read(data).frames(number, lambda frame: frame)])


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return video_file(tmp_path_factory.mktemp("videos") / "video.mp4")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_picture_is_that_of_diffusers(tmp_path, format):
    """Upright, without transparency."""
    picture = shades(1)[0]
    if format != "JPEG":
        picture.putalpha(100)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    (tmp_path / "picture").write_bytes(picture_file(format, picture, exif=exif))
    wanted = np.asarray(load_image(str(tmp_path / "picture")))
    assert wanted.shape == (40, 24, 3)
    data = (tmp_path / "picture").read_bytes()
    assert np.array_equal(frames_of(data), wanted[None])
    file = StartFile.read(data)
    assert (file.media, file.num_frames, file.is_picture) == (f"image/{format.lower()}", 1, True)


@pytest.mark.parametrize("name,words", [("a.mp4", ()), ("a.mov", ()), ("a.webm", ("-c:v", "libvpx-vp9"))])
def test_a_video_is_that_of_ffmpeg(tmp_path, name, words):
    path = video_file(tmp_path / name, 25, 24, 40, *words)
    wanted = iio.imread(path, plugin="FFMPEG")
    frames = frames_of(path.read_bytes())
    assert frames.shape == wanted.shape == (25, 24, 40, 3)
    assert np.array_equal(frames, wanted)
    file = StartFile.read(path.read_bytes())
    assert (file.media.split("/")[0], file.num_frames, file.is_picture) == ("video", 25, False)
    assert np.array_equal(frames_of(path.read_bytes(), 9), wanted[:9])


def test_a_video_of_a_telephone_is_upright(video, tmp_path):
    ffmpeg("-display_rotation", 90, "-i", video, "-c", "copy", tmp_path / "turned.mp4")
    ffmpeg("-i", tmp_path / "turned.mp4", "-frames:v", 1, tmp_path / "first.png")
    wanted = np.asarray(Image.open(tmp_path / "first.png").convert("RGB"))
    frames = frames_of((tmp_path / "turned.mp4").read_bytes())
    assert frames.shape == (25, 40, 24, 3)
    assert abs(frames[0].astype(int) - wanted).mean() < 2


def test_a_long_video_is_read_up_to_the_bound(tmp_path):
    path = video_file(tmp_path / "long.mp4", MAX_FRAMES + 20)
    assert StartFile.read(path.read_bytes()).num_frames == MAX_FRAMES


def test_the_thumbnail_is_small():
    file = StartFile.read(picture_file("PNG", shades(1, 600, 900)[0]))
    head, text = file.thumbnail.split(",")
    assert head == "data:image/jpeg;base64" and len(text) < 40_000
    with Image.open(io.BytesIO(base64.b64decode(text))) as thumbnail:
        assert thumbnail.size == (160, 107)


def test_a_uri_is_the_file_again(video):
    file = StartFile.read(video.read_bytes())
    assert StartFile.from_uri(file.uri) == file
    assert base64.b64decode(file.uri.removeprefix("data:video/mp4;base64,")) == video.read_bytes()


@pytest.mark.parametrize(
    "uri,message",
    [
        (5, "must be a data URI in base64"),
        ("data:image/png,abc", "must be a data URI in base64"),
        ("file:///etc/passwd", "must be a data URI in base64"),
        ("data:image/png;base64,%%%", "base64"),
        ("data:image/png;base64,aGVsbG8=", "one of image/jpeg, .*, and this is none of them"),
    ],
)
def test_texts_that_are_no_file(uri, message):
    with pytest.raises(ValueError, match=message):
        StartFile.from_uri(uri)


# What is wrong with a file


def refuse(data: bytes, message: str):
    with pytest.raises(ValueError, match=message) as error:
        StartFile.read(data)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_other_formats_are_refused(tmp_path):
    """By what they are, not by their names; a playlist would have other files read."""
    playlist = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
    for data in (b"", b"hello", b"<svg onload=alert(1)>", playlist, picture_file("GIF"), picture_file("TIFF")):
        refuse(data, "one of image/jpeg, image/png, image/webp, .*, and this is none of them")
    refuse(b"\0\0\0\x20ftypisom" + playlist, "this video/mp4 cannot be used")


def test_too_many_bytes_are_refused_unread(monkeypatch):
    monkeypatch.setattr(start_file_module, "_decode", None)
    refuse(bytes(MAX_BYTES + 1), f"at most {MAX_BYTES} bytes, not {MAX_BYTES + 1}")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_half_a_picture_is_refused(format):
    data = picture_file(format, shades(1, 200, 200)[0])
    for part in (len(data) // 2, 3 * len(data) // 4, 40):
        refuse(data[:part], f"this image/{format.lower()} cannot be used: .")


@pytest.mark.parametrize(
    "name,words",
    [("late.mp4", ()), ("early.mp4", ("-movflags", "+faststart")), ("a.webm", ("-c:v", "libvpx-vp9"))],
)
def test_half_a_video_is_refused(tmp_path, name, words):
    data = video_file(tmp_path / name, 25, 64, 64, *words).read_bytes()
    for part in (len(data) // 2, 2 * len(data) // 3, 40):
        refuse(data[:part], "this video/(mp4|webm) cannot be used: .")


def test_a_video_that_is_broken_inside_is_refused(video):
    """Its frames would be grey, or those before."""
    data = bytearray(video.read_bytes())
    start = data.index(b"mdat") + 900
    data[start : start + 300] = np.random.default_rng(0).bytes(300)
    refuse(bytes(data), "this video/mp4 cannot be used: .")


def png_header(width: int, height: int) -> bytes:
    """A picture of that size whose pixels are zeros, a thousandth of them in bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((width + 1) * min(height, 2000)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_bombs_are_refused(tmp_path):
    refuse(png_header(8000, 8000), "8000x8000 are more than 33554432 pixels")
    refuse(png_header(60_000, 60_000), "cannot be used: .*pixels")
    big = video_file(tmp_path / "big.mp4", 2, 4000, 4000)
    refuse(big.read_bytes(), "4000x4000 are more than 8388608 pixels")
    # It says that it has 100 million samples of one byte, for which ffmpeg takes memory.
    data = bytearray(video_file(tmp_path / "index.mp4", 3).read_bytes())
    for box, values in ((b"stsz", (0, 1, 10**8)), (b"stsc", (0, 1, 1, 10**8))):
        start = data.index(box) + 4
        data[start : start + 4 * len(values)] = struct.pack(f">{len(values)}I", *values)
    refuse(bytes(data), "this video/mp4 cannot be used: .")


def test_a_decoder_that_takes_too_long_is_ended(video, monkeypatch):
    monkeypatch.setattr(start_file_module, "MAX_SECONDS", 0.01)
    refuse(video.read_bytes(), "this video/mp4 cannot be used: it takes more than 0.01 s")
    assert not [child for child in psutil.Process().children() if "decode_file" in " ".join(child.cmdline())]


def test_a_decoder_that_crashes_is_told_in_a_line(tmp_path, monkeypatch):
    (tmp_path / "crash.py").write_text("import os; os.abort()")
    monkeypatch.setattr(start_file_module.decode_file, "__file__", str(tmp_path / "crash.py"))
    refuse(picture_file(), "this image/png cannot be used: its decoder crashed")


def test_the_decoder_has_little_memory(tmp_path, monkeypatch):
    """One that asks for as much as it may have gets an error, and the server nothing of it."""
    script = """
        import sys
        sys.path.insert(0, {folder!r})
        import decode_file
        greedy = lambda data, name, max_pixels: iter([bytearray(decode_file.MAX_MEMORY)])
        decode_file.FORMATS["image/png"] = decode_file.Format(None, greedy, "PNG", 0)
        decode_file.main("image/png", "1")
    """
    decoder = Path(start_file_module.decode_file.__file__)
    (tmp_path / "greedy.py").write_text(textwrap.dedent(script.format(folder=str(decoder.parent))))
    monkeypatch.setattr(start_file_module.decode_file, "__file__", str(tmp_path / "greedy.py"))
    refuse(picture_file(), "this image/png cannot be used: MemoryError")


def test_without_pyav_there_are_pictures_alone(monkeypatch):
    pictures, videos = ["image/jpeg", "image/png", "image/webp"], ["video/quicktime", "video/mp4", "video/webm"]
    assert (available_media(True), available_media(False)) == (pictures + videos, videos)
    monkeypatch.setattr("astrolabe_diffusers.live.start_file.importlib.util.find_spec", lambda name: None)
    assert (available_media(True), available_media(False)) == (pictures, [])
