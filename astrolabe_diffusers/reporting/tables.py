"""Numbers and tables as text."""

from __future__ import annotations

from collections.abc import Sequence

from .markdown import escape


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def comparison_table(rows: Sequence[tuple[str, float, float, float, float]], rewards: Sequence[str]) -> str:
    """The rows of [`comparison_rows`] as text. Scores of `rewards` were trained on, the others are only watched."""
    width = max(len(row[0]) for row in rows) + 2
    lines = [f"{'':<{width}}{'before':>9}{'after':>9}   change (95 % interval)"]
    trained = {row[0] for row in rows if row[0] == "reward" or row[0].split("/")[0] in rewards}
    for title, wanted in (("trained on:", True), ("only watched:", False)):
        group = [row for row in rows if (row[0] in trained) == wanted]
        lines += [title] * bool(group)
        for name, old, new, change, half in group:
            lines.append(f"  {name:<{width - 2}}{old:>9.4f}{new:>9.4f}   {change_text(change, half)}")
    return "\n".join(lines)


def change_text(change: float, half: float) -> str:
    """A change and its interval, `half` to either side."""
    return f"{change:+.4f}  [{change - half:+.4f}, {change + half:+.4f}]"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A table of any texts in GitHub's Markdown, padded to be read as text too; the first row has the headings."""
    rows = [[escape(cell) for cell in row] for row in rows]
    widths = [max(2, *map(len, column)) for column in zip(*rows)]
    lines = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))] for row in rows
    ]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
