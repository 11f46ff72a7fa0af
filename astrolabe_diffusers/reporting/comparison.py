"""Scores of the same videos before and after, or with and without."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch


@dataclass
class Evaluation:
    """Scores of one evaluation, at a `step` if it is a run's: for every name one value a held-out video, always in
    the same order. A NaN, of a video that a reward could not score, is left out of means."""

    step: int | None
    scores: dict[str, list[float]]

    def mean(self, name: str = "reward") -> float:
        return torch.tensor(self.scores[name], dtype=torch.float64).nanmean().item()

    def to_json(self) -> dict:
        return {**asdict(self), "mean": {name: self.mean(name) for name in self.scores}}


def paired_difference(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Mean of `after - before` over pairs, and half its 95 % interval (normal approximation). NaN is left out."""
    differences = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    differences = differences[~differences.isnan()]
    half_width = 1.96 * differences.std().item() / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return differences.mean().item(), half_width


def comparison_rows(before: Evaluation, after: Evaluation) -> list[tuple[str, float, float, float, float]]:
    """For every score its name, the means before and after, their paired difference and half its 95 % interval."""
    return [
        (name, before.mean(name), after.mean(name), *paired_difference(before.scores[name], after.scores[name]))
        for name in after.scores
        if name in before.scores
    ]


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
