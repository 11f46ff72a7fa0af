"""A start image comes to the video's size as Pillow's bilinear filter brings it there, whatever it is given as."""

import numpy as np
import PIL.Image
import pytest
import torch

from astrolabe_diffusers.pipelines.start_frames import read_start
from tests.tiny_pipeline import tiny_pipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(num_frames_per_block=1)


@pytest.fixture(scope="module")
def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (75, 110, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def expected(picture):
    """torchvision's Resize of a picture is Pillow's; then [-1, 1] (1, 3, 1, 32, 48)."""
    pixels = np.asarray(picture.resize((48, 32), PIL.Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None, :, None] / 127.5 - 1


def start_of(pipe, image=None, video=None):
    start = read_start(pipe, image, video, None, (32, 48))
    return start.frames, start.num_frames


def test_pictures(pipe, picture):
    start, given = start_of(pipe, image=picture)
    assert given == 1 and (start - expected(picture)).abs().max() < 1e-6
    lanczos = np.asarray(picture.resize((48, 32), PIL.Image.Resampling.LANCZOS)).astype(np.float32)
    assert (start[0, :, 0] - torch.from_numpy(lanczos / 127.5 - 1).permute(2, 0, 1)).abs().max() > 0.05
    start, given = start_of(pipe, video=[picture] * 5)
    assert given == 5 and (start - expected(picture)).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_arrays_are_resized_as_pictures(kind, pipe, picture):
    """Up to Pillow's rounding of each of its two passes to whole numbers."""
    array = np.asarray(picture).astype(np.float32) / 255
    given = array[None] if kind == "array" else torch.from_numpy(array).permute(2, 0, 1)[None]
    start, _ = start_of(pipe, image=given)
    assert (start - expected(picture)).abs().max() < 2.5 / 127.5


def test_what_has_the_size_stays_as_it_is(pipe):
    video = torch.rand(1, 5, 3, 32, 48)
    start, _ = start_of(pipe, video=video)
    assert torch.equal(start, 2 * video.permute(0, 2, 1, 3, 4) - 1)
