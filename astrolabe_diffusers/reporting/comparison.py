"""Scores of the same videos before and after, or with and without."""

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Self

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

    @classmethod
    def from_json(cls, record: dict) -> Self:
        """What a file has of [`~Evaluation.to_json`], where a NaN is null."""
        scores = {name: [math.nan if v is None else v for v in values] for name, values in record["scores"].items()}
        return cls(record["step"], scores)


def paired_difference(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """`change`, the mean of `after - before` over pairs, and `half_width_95`, half its 95 % interval (normal
    approximation), NaN of a single pair. NaN is left out."""
    differences = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    differences = differences[~differences.isnan()]
    half_width = 1.96 * differences.std().item() / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return {"change": differences.mean().item(), "half_width_95": half_width}


def mean_interval(values: Sequence[float]) -> dict[str, float]:
    """`mean` and `half_width_95`, half its 95 % interval (normal approximation), NaN of a single value. NaN is left
    out."""
    difference = paired_difference([0.0] * len(values), values)
    return {"mean": difference["change"], "half_width_95": difference["half_width_95"]}


def compare(before: Evaluation, after: Evaluation) -> dict[str, dict[str, float]]:
    """For every score the means `before` and `after`, and their [`paired_difference`]."""
    return {
        name: {"before": before.mean(name), "after": after.mean(name)} | paired_difference(before.scores[name], scores)
        for name, scores in after.scores.items()
        if name in before.scores
    }


def comparison_table(scores: dict[str, dict[str, float]], rewards: Collection[str]) -> str:
    """What [`compare`] returns as text. Scores of `rewards` were trained on, the others are only watched."""
    width = max(map(len, scores)) + 2
    lines = [f"{'':<{width}}{'before':>9}{'after':>9}   change (95 % interval)"]
    trained = [name for name in scores if name == "reward" or name.split("/")[0] in rewards]
    watched = [name for name in scores if name not in trained]
    for title, names in (("trained on:", trained), ("only watched:", watched)):
        lines += [title] * bool(names)
        for name in names:
            old, new, change = scores[name]["before"], scores[name]["after"], change_text(scores[name])
            lines.append(f"  {name:<{width - 2}}{old:>9.4f}{new:>9.4f}   {change}")
    return "\n".join(lines)


def change_text(difference: dict[str, float]) -> str:
    """A [`paired_difference`] with both ends of its interval, if there is one."""
    change, half = difference["change"], difference["half_width_95"]
    if math.isnan(half):
        return "nan" if math.isnan(change) else f"{change:+.4f}"
    return f"{change:+.4f}  [{change - half:+.4f}, {change + half:+.4f}]"


def mean_text(interval: dict[str, float]) -> str:
    """A [`mean_interval`] as a mean and half the width of its interval, if there is one."""
    half = interval["half_width_95"]
    return f"{interval['mean']:.4f}" + ("" if math.isnan(half) else f" \u00b1 {half:.4f}")
