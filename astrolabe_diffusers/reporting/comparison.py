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


def compare(before: Evaluation, after: Evaluation) -> dict[str, dict[str, float]]:
    """For every score, by its name, the means `before` and `after`, their paired `change` and `half_width_95`."""
    changes = {}
    for name in [name for name in after.scores if name in before.scores]:
        change, half = paired_difference(before.scores[name], after.scores[name])
        means = {"before": before.mean(name), "after": after.mean(name)}
        changes[name] = {**means, "change": change, "half_width_95": half}
    return changes


def comparison_table(changes: dict[str, dict[str, float]], rewards: Sequence[str]) -> str:
    """What [`compare`] returns as text. Scores of `rewards` were trained on, the others are only watched."""
    width = max(map(len, changes)) + 2
    lines = [f"{'':<{width}}{'before':>9}{'after':>9}   change (95 % interval)"]
    trained = [name for name in changes if name.split("/")[0] in ("reward", *rewards)]
    watched = [name for name in changes if name not in trained]
    for title, names in (("trained on:", trained), ("only watched:", watched)):
        lines += [title] * bool(names)
        for name in names:
            score = changes[name]
            means = f"{score['before']:>9.4f}{score['after']:>9.4f}"
            lines.append(f"  {name:<{width - 2}}{means}   {change_text(score)}")
    return "\n".join(lines)


def change_text(score: dict[str, float]) -> str:
    """The `change` of a score and its interval."""
    change, half = score["change"], score["half_width_95"]
    return f"{change:+.4f}  [{change - half:+.4f}, {change + half:+.4f}]"
