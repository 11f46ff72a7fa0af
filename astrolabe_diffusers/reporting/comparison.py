"""Scores of the same videos before and after, or with and without."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch


@dataclass
class Evaluation:
    """Scores of one evaluation: for every name one value a held-out video, always in the same order.

    A NaN, of a video that a reward could not score, is left out of means. `step` is that of the run, if it is one.
    """

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
