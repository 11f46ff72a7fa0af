import io

import numpy as np
import pytest
import torch
from PIL import Image

from astrolabe_diffusers.reporting.videos import (
    comparison_video,
    contact_sheet,
    gif_bytes,
    side_by_side,
    small_gif_bytes,
    video_images,
)


def colored(color, frames=5, height=32, width=48):
    return torch.tensor(color).view(1, 3, 1, 1).expand(frames, 3, height, width)


RED, GREEN = colored([1.0, 0.0, 0.0]), colored([0.0, 1.0, 0.0])


def test_video_images_are_the_frames():
    video = torch.rand(2, 3, 8, 8)
    images = video_images(video, (16, 16))
    assert len(images) == 2 and images[0].size == (16, 16)
    expected = (video[1] * 255).round().permute(1, 2, 0).numpy()
    assert np.array_equal(np.array(images[1])[::2, ::2], expected)


def test_gif_moves():
    videos = [torch.rand(5, 3, 32, 32), torch.rand(5, 3, 32, 32)]
    gif = Image.open(io.BytesIO(gif_bytes(side_by_side(videos, len(videos)), 16)))
    assert gif.n_frames == 5 and gif.info["loop"] == 0 and 50 <= gif.info["duration"] <= 70
    assert gif.size == (2 * 132, 132)


def test_small_gif_keeps_the_pace():
    images = video_images(torch.rand(6, 3, 100, 800))
    gif = Image.open(io.BytesIO(small_gif_bytes(images, 16)))
    assert (gif.size, gif.n_frames, gif.info["duration"]) == ((640, 80), 3, 120)  # hundredths of a second, rounded
    small = Image.open(io.BytesIO(small_gif_bytes(images[:2], 8, max_width=1000)))
    assert (small.size, small.n_frames) == ((800, 100), 2)


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("size", [(32, 48), (480, 832)])
def test_before_and_after_are_side_by_side(number, size):
    red, green = (colored(c, 3, *size) for c in ([1.0, 0, 0], [0, 1.0, 0]))
    frames = comparison_video({"before": [red] * number, "after": [green] * number})
    assert len(frames) == 3 and frames[0].width % 16 == 0 and frames[0].height % 16 == 0
    pixels = np.array(frames[1])
    is_red, is_green = ((pixels == c).all(-1) for c in ([255, 0, 0], [0, 255, 0]))
    assert is_red.sum() == is_green.sum() > 0
    row = is_red.any(1).nonzero()[0][0]
    assert is_red[row].nonzero()[0][0] < is_green[row].nonzero()[0][0]


def test_any_number_of_columns():
    blue = colored([0.0, 0.0, 1.0])
    columns = {"base": [RED] * 3, "a name that is far too long for its column": [GREEN] * 3, "last": [blue] * 3}
    frame = np.array(comparison_video(columns)[0])
    sheet = np.array(contact_sheet(columns, ["one", "two", "three"]))
    for picture, edges in ((frame, 4), (sheet, 3)):
        # From left to right; the video has two groups of three tiles in its first row.
        row = (picture == [255, 0, 0]).all(-1).any(1).nonzero()[0][0]
        shown = [tuple(color) for color in picture[row] if tuple(color) != (255, 255, 255)]
        order = [color for i, color in enumerate(shown) if i == 0 or color != shown[i - 1]]
        one_group = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
        assert order == (2 * one_group if edges == 4 else one_group)


def test_contact_sheet_has_a_row_a_pair():
    columns = {"before": [RED, RED, RED], "after": [GREEN, GREEN, GREEN]}
    sheet = contact_sheet(columns, ["short", "a very long caption " * 30, "last"])
    pixels = np.array(sheet)
    left, right = pixels[:, : sheet.width // 2], pixels[:, sheet.width // 2 :]
    for half, color in ((left, [255, 0, 0]), (right, [0, 255, 0])):
        mask = (half == color).all(-1)
        assert mask.sum() == 3 * 4 * 96 * 64
    middle = (left == [255, 0, 0]).all(-1).any(1)
    assert np.diff(middle.astype(int)).clip(0).sum() == 3
