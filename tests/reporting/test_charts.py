"""Where the marks of charts are, read from the pixels."""

import numpy as np
import pytest
from PIL import Image

from astrolabe_diffusers.reporting.charts import draw_curves, draw_intervals, draw_means


BLUE, RED = (31, 119, 180), (214, 39, 40)  # of the first and the second
NAN = float("nan")


def pixels_of(path):
    return np.array(Image.open(path).convert("RGB")).astype(int)


def drawn(pixels, color):
    """Rows and columns of the pixels that have just this color."""
    return np.nonzero((pixels == color).all(-1))


def test_curves_go_where_the_numbers_are(tmp_path):
    path = tmp_path / "curves.png"
    rising = [(step, 0.4 + step / 160) for step in range(81)]
    draw_curves({"train": rising, "held-out": [(0, 0.3), (40, NAN), (80, 0.1)]}, path, "title")
    pixels = pixels_of(path)
    assert pixels.shape == (450, 800, 3) and path.stat().st_size < 40_000
    blue, red = (dict(zip(*reversed(drawn(pixels[:, 250:], color)))) for color in (BLUE, RED))
    # The values 0.4 + x / 160 and 0.3 - x / 400 at every column: one scale for both.
    ends = [(rows[min(rows)], rows[max(rows)]) for rows in (blue, red)]
    rise, fall = ends[0][0] - ends[0][1], ends[1][1] - ends[1][0]
    assert rise / fall == pytest.approx(160 / 64, rel=0.1) and rise > 100
    assert max(blue.values()) < min(red.values())


@pytest.mark.parametrize("points", [[], [(0, NAN)], [(0, 0.5)], [(0, 0.5), (1, 0.5)], [(3, 0.0)]])
def test_degenerate_curves(tmp_path, points):
    draw_curves({"train": points, "held-out": []}, tmp_path / "curves.png", "title")
    assert (tmp_path / "curves.png").exists() == bool(points and points[0][1] == points[0][1])


def test_means_go_where_the_numbers_are(tmp_path):
    """Two charts of very different scale: the second mean above the first one, then below it."""
    path = tmp_path / "means.png"
    draw_means({"a/part": [(0.5, 0.0), (0.9, 0.1)], "b": [(300, NAN), (100, NAN)]}, ["base", "lora"], path, "title")
    pixels = pixels_of(path)[:-45]  # the legend is below
    middle = pixels.shape[1] // 2
    whiskers = []
    for chart, rises in ((pixels[:, :middle], True), (pixels[:, middle:], False)):
        rows, columns = drawn(chart, BLUE)
        assert np.ptp(columns) > 150  # the base's line, through the whole chart
        line, (marks, _) = np.bincount(rows).argmax(), drawn(chart, RED)
        assert (marks.mean() < line) == rises and abs(marks.mean() - line) > 60
        whiskers.append(np.ptp(marks))
    assert whiskers[0] > 45 and whiskers[1] < 15


def test_intervals_go_where_the_numbers_are(tmp_path):
    """A curve keeps its colour in a chart that lacks another, and NaN has no mark."""
    path = tmp_path / "intervals.png"
    charts = {
        "left": {"new": [(1, 0.9, 0.05), (2, 0.8, 0.05)], "old": [(1, 0.1, 0.05), (2, 0.2, 0.05)]},
        "right": {"old": [(1, 0.5, 0.3), (2, NAN, NAN)]},
    }
    draw_intervals(charts, path, "title", "block")
    pixels = pixels_of(path)[:-45]  # the legend is below
    left, right = pixels[:, : pixels.shape[1] // 2], pixels[:, pixels.shape[1] // 2 :]
    assert drawn(left, BLUE)[0].max() < drawn(left, RED)[0].min()
    rows, columns = drawn(right, RED)
    assert len(rows) and not len(drawn(right, BLUE)[0])
    assert np.ptp(rows) > 150 and np.ptp(columns) < 20  # one long whisker


@pytest.mark.parametrize("number", [1, 5, 9])
def test_every_score_has_its_chart(tmp_path, number):
    draw_means({str(i): [(i, 0.1), (i + 1, 0.1)] for i in range(number)}, ["one", "two"], tmp_path / "means.png", "")
    height, width = pixels_of(tmp_path / "means.png").shape[:2]
    assert round(width / 240) == min(number, 4) and round((height - 60) / 210) == -(-number // 4)


@pytest.mark.parametrize("mark", [(NAN, NAN), (0.0, 0.0)])
def test_degenerate_means(tmp_path, mark):
    draw_means({"a": [mark]}, ["base"], tmp_path / "means.png", "a title that is wider than the only chart below it")
    assert pixels_of(tmp_path / "means.png").shape[1] > 300


def test_names_show_as_they_are(tmp_path):
    """Neither formulas, which matplotlib would refuse to draw, nor hidden, which `_` is for it."""
    draw_curves({"train": [(0, 1.0)]}, tmp_path / "curves.png", r"$\nonsense$")
    sizes = []
    for name in ("_", "_" + 40 * "m", r"$\nonsense$"):
        draw_means({name: [(0.5, 0.1)]}, [name], tmp_path / "means.png", name)
        sizes.append(pixels_of(tmp_path / "means.png").shape[1])
    assert sizes[1] > sizes[0]
