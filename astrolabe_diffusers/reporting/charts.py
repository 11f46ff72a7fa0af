"""Charts as PNG files: the curves of a run, and means of scores with their intervals."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib import cycler, rc_context
from matplotlib.figure import Figure


COLORS = ("tab:blue", "tab:red", "tab:green", "tab:purple", "tab:orange", "tab:cyan")
STYLE = {
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "axes.prop_cycle": cycler(color=COLORS),
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "axes.ymargin": 0.08,
    "grid.color": "0.88",
    # Names and prompts of users are no formulas.
    "text.parse_math": False,
}


@rc_context(STYLE)
def draw_curves(curves: dict[str, Sequence[tuple[int, float]]], path: str | Path, title: str):
    """A chart of 800 x 450 pixels: `curves` are points, step and reward, by name, with a mark at each if there are
    few. Points that are not finite are left out; nothing is drawn if there is no other."""
    finite = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in curves.items()}
    curves = {name: points for name, points in finite.items() if points}
    if not curves:
        return
    figure = Figure((8, 4.5))
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot(*zip(*points), "o-" if len(points) <= 30 else "-", markersize=4, label=name)
    axes.xaxis.get_major_locator().set_params(integer=True)
    left, right = axes.get_xlim()
    axes.set_xlim(left, max(right, left + 1))
    axes.set(xlabel="optimizer step", ylabel="reward", title=title)
    axes.legend()
    figure.savefig(path, format="png")


@rc_context(STYLE)
def draw_intervals(
    charts: dict[str, dict[str, Sequence[tuple[float, float, float]]]], path: str | Path, title: str, xlabel: str
):
    """Charts under their names, two in a row: curves by name, points `x`, mean and half the width of its interval."""
    columns = min(2, len(charts))
    rows = math.ceil(len(charts) / columns)
    figure = Figure((0.1 + 4.4 * columns, 0.9 + 3 * rows))
    places = iter(figure.subplots(rows, columns, squeeze=False).flat)
    handles: dict[str, object] = {}
    for (name, curves), axes in zip(charts.items(), places):
        for i, (label, points) in enumerate(curves.items()):
            # A curve that lacks in one chart has its colour in all others.
            color = COLORS[list(handles).index(label) % len(COLORS)] if label in handles else None
            color = color or COLORS[len(handles) % len(COLORS)]
            x, mean, half = zip(*points)
            handles[label] = axes.errorbar(x, mean, half, fmt="o-", markersize=4, capsize=3, color=color)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel(xlabel)
        axes.set_title(name, fontsize="small")
    for axes in places:
        axes.remove()
    figure.suptitle(title)
    figure.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=2)
    figure.savefig(path, format="png")


@rc_context(STYLE)
def draw_means(means: dict[str, Sequence[tuple[float, float]]], names: Sequence[str], path: str | Path, title: str):
    """A small chart for each score, with its own scale: a mark at every mean, a line at that of the first. `means` are
    by score, for each of `names` the mean and half the width of its interval, NaN where there is none."""
    columns = min(4, len(means))
    rows = math.ceil(len(means) / columns)
    figure = Figure((0.1 + 2.4 * columns, 0.62 + 2.1 * rows))
    charts = iter(figure.subplots(rows, columns, squeeze=False).flat)
    for (score, marks), axes in zip(means.items(), charts):
        handles = [axes.errorbar(i, mean, half, fmt="o", capsize=5) for i, (mean, half) in enumerate(marks)]
        axes.axhline(marks[0][0], color=COLORS[0], linewidth=1)
        axes.set(xlim=(-0.5, len(marks) - 0.5), xticks=[])
        # The end of a long name is what tells parts apart.
        short = score if len(score) <= 32 else "... " + score[-28:]
        axes.set_title(short, fontsize="small")
    for axes in charts:
        axes.remove()
    heading = figure.suptitle(title)
    legend = figure.legend(handles, names, loc="outside lower left", ncols=len(names))
    # The picture is as wide as the charts, or as the title or the names of all columns where these are wider.
    figure.draw_without_rendering()
    widest = max(artist.get_window_extent().width for artist in (heading, legend))
    figure.set_figwidth(max(figure.get_figwidth(), widest / figure.dpi + 0.2))
    figure.savefig(path, format="png")
