import imageio.v3
import imageio_ffmpeg
import numpy as np
import pytest
from diffusers.utils import export_to_video
from PIL import Image

from astrolabe_diffusers.files.video import VideoWriter


@pytest.fixture
def frames():
    """21 frames of 24x40 pixels: a gradient that moves."""
    x = np.linspace(0, 2 * np.pi, 40)
    rows = [127.5 * (1 + np.sin(x + 0.2 * t)) for t in range(21)]
    return np.stack([np.broadcast_to(row[None, :, None], (24, 40, 3)) for row in rows]).astype(np.uint8)


def test_pieces_give_the_file_of_the_whole_video(frames, tmp_path):
    with VideoWriter(tmp_path / "pieces.mp4", 24, 40, 12) as writer:
        for piece in (frames[:9], frames[9:]):
            writer.write(piece)
            assert not writer.path.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["pieces.mp4"]
    images = [Image.fromarray(frame) for frame in frames]
    export_to_video(images, str(tmp_path / "whole.mp4"), fps=12, macro_block_size=2)
    decoded = imageio.v3.imread(tmp_path / "pieces.mp4")
    np.testing.assert_array_equal(decoded, imageio.v3.imread(tmp_path / "whole.mp4"))
    assert np.abs(decoded.astype(float) - frames).mean() < 3
    assert imageio.v3.immeta(tmp_path / "pieces.mp4")["fps"] == 12


def test_nothing_is_left_after_an_exception(frames, tmp_path):
    (tmp_path / "a.mp4").write_text("what was there before")
    with pytest.raises(KeyboardInterrupt):
        with VideoWriter(tmp_path / "a.mp4", 24, 40, 12) as writer:
            writer.write(frames)
            raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_text() == "what was there before"


def test_frames_that_do_not_arrive_are_an_error(frames, tmp_path):
    """Half a frame is what a pipe holds that broke."""
    with pytest.raises(OSError, match="only 9 of 10 frames arrived"):
        with VideoWriter(tmp_path / "a.mp4", 24, 40, 12) as writer:
            writer.write(frames[:9])
            writer.write(frames[9:10, :12])
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_one_line(frames, tmp_path, capfd):
    (tmp_path / "a.mp4.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="ffmpeg ended while it wrote .*a.mp4.partial: is the disk full") as error:
        with VideoWriter(tmp_path / "a.mp4", 24, 40, 12) as writer:
            for _ in range(1000):  # more than the pipe holds
                writer.write(frames)
    assert "\n" not in str(error.value) and capfd.readouterr().err == ""
    assert list(tmp_path.iterdir()) == []


def test_encoder_that_fails_is_an_error(frames, tmp_path, monkeypatch):
    # As a full disk does, an encoder that is not there fails without an exception in Python.
    monkeypatch.setattr(imageio_ffmpeg._io, "get_first_available_h264_encoder", lambda: "nonsense")
    with pytest.raises(OSError):
        with VideoWriter(tmp_path / "a.mp4", 24, 40, 12) as writer:
            writer.write(frames)
    assert list(tmp_path.iterdir()) == []
