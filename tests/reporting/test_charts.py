import io

import numpy as np
import pytest
import torch
from PIL import Image

from astrolabe_diffusers.reporting.charts import COLORS, draw_curves, draw_means, nice_ticks
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


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.711, 0.763, [0.72, 0.73, 0.74, 0.75, 0.76]),
        (-30, 80, [-20, 0, 20, 40, 60, 80]),
    ],
)
def test_ticks_are_round(low, high, ticks):
    assert nice_ticks(low, high) == pytest.approx(ticks)


def test_step_axis_has_whole_ticks():
    assert nice_ticks(0, 4, 8, smallest_step=1) == [0, 1, 2, 3, 4]


def test_curves_go_where_the_numbers_are(tmp_path):
    path = tmp_path / "curves.png"
    rising = [(step, step / 80) for step in range(81)]
    draw_curves({"train": rising, "held-out": [(0, 1.0), (40, float("nan")), (80, 0.0)]}, path, "title", "step", "y")
    pixels = np.array(Image.open(path)).astype(int)
    assert path.stat().st_size < 40_000

    def heights(color):
        rows, columns = np.nonzero((pixels[60:390] == color).all(-1))
        return rows[columns < 120].mean(), rows[(columns > 720) & (columns < 780)].mean()

    for color, rises in zip(COLORS, (True, False)):
        left, right = heights(color)
        assert (right < left) == rises and abs(left - right) > 200


@pytest.mark.parametrize("points", [[], [(0, float("nan"))], [(0, 0.5)], [(0, 0.5), (1, 0.5)], [(3, 0.0)]])
def test_degenerate_curves(tmp_path, points):
    draw_curves({"train": points, "held-out": []}, tmp_path / "curves.png", "title", "step", "y")
    assert (tmp_path / "curves.png").exists() == bool(points and points[0][1] == points[0][1])


def test_means_go_where_the_numbers_are(tmp_path):
    """Two charts of very different scale: the second mean above the first one, then below it."""
    path = tmp_path / "means.png"
    nan = float("nan")
    draw_means({"a/part": [(0.5, 0.0), (0.9, 0.1)], "b": [(300, nan), (100, nan)]}, ["base", "lora"], path, "title")
    pixels = np.array(Image.open(path)).astype(int)[62:]
    assert pixels.shape[:2] == (210, 2 * 240 + 10)
    for chart, rises in ((pixels[:, 62:240], True), (pixels[:, 302:480], False)):
        # A column beside the marks has the base's line; the LoRA's mark is the middle of its own pixels.
        line = (chart[:, 2] == COLORS[0]).nonzero()[0].mean()
        mark = (chart == COLORS[1]).all(-1).nonzero()[0].mean()
        assert (mark < line) == rises and abs(mark - line) > 60
    whiskers = [(half == COLORS[1]).all(-1).any(1).sum() for half in (pixels[:, 62:240], pixels[:, 302:480])]
    assert whiskers[0] > 50 and whiskers[1] < 15


@pytest.mark.parametrize("mark", [(float("nan"), float("nan")), (0.0, 0.0)])
def test_degenerate_means(tmp_path, mark):
    draw_means({"a": [mark]}, ["base"], tmp_path / "means.png", "a title that is wider than the only chart below it")
    assert Image.open(tmp_path / "means.png").width > 300


def test_video_images_are_the_frames():
    video = torch.rand(2, 3, 8, 8)
    images = video_images(video, (16, 16))
    assert len(images) == 2 and images[0].size == (16, 16)
    expected = (video[1] * 255).round().permute(1, 2, 0).numpy()
    assert np.array_equal(np.array(images[1])[::2, ::2], expected)


def test_gif_moves():
    videos = [torch.rand(5, 3, 32, 32), torch.rand(5, 3, 32, 32)]
    gif = Image.open(io.BytesIO(gif_bytes(side_by_side(videos), 16)))
    assert gif.n_frames == 5 and gif.info["loop"] == 0 and 50 <= gif.info["duration"] <= 70
    assert gif.size == (2 * 132, 132)


def test_small_gif_keeps_the_pace():
    images = video_images(torch.rand(16, 3, 100, 800))
    gif = Image.open(io.BytesIO(small_gif_bytes(images, 16)))
    assert (gif.size, gif.n_frames, gif.info["duration"]) == ((640, 80), 8, 120)  # hundredths of a second, rounded
    small = Image.open(io.BytesIO(small_gif_bytes(images[:4], 8, max_width=1000)))
    assert (small.size, small.n_frames) == ((800, 100), 4)


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
    sheet = contact_sheet(columns, ["short", "a very long caption " * 30, "last"], num_frames=4)
    pixels = np.array(sheet)
    left, right = pixels[:, : sheet.width // 2], pixels[:, sheet.width // 2 :]
    for half, color in ((left, [255, 0, 0]), (right, [0, 255, 0])):
        mask = (half == color).all(-1)
        assert mask.sum() == 3 * 4 * 96 * 64
    middle = (left == [255, 0, 0]).all(-1).any(1)
    assert np.diff(middle.astype(int)).clip(0).sum() == 3
