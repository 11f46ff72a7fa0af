"""Which samples are held to the reference policy, and when the reference moves (Astrolabe 3.4, after GARDO)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch


def ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks `(N,)` from 1, the lowest value, to N; equal values share the mean of their ranks."""
    lower = (values[:, None] > values[None, :]).sum(1)
    equal = (values[:, None] == values[None, :]).sum(1)
    return lower + (equal + 1) / 2


def rank_disagreement(primary: torch.Tensor, others: Sequence[torch.Tensor]) -> torch.Tensor:
    """`D_i = rank of i by the primary reward - mean of its ranks by the others`, `(N,)`, in (-N, N).

    High where the primary reward alone likes a sample: there it may be hacked. Rewards are `(N,)` without NaN. The
    ranks in the released code run the other way round.
    """
    return ranks(primary) - torch.stack([ranks(other) for other in others]).mean(0)


class RiskController:
    """Chooses the samples that are held to the reference.

    Of the non-negative disagreements those from their `100 (1 - rho)` percentile on, zeros excepted. The risk ratio
    `rho` grows by `rate` of itself when disagreement passes all of the last `buffer_size` epochs, and shrinks when it
    falls below them. What is compared is the mean of the non-negative disagreements: that of all is zero.
    """

    def __init__(self, ratio: float, rate: float, minimum: float, maximum: float, buffer_size: int):
        self.ratio = ratio
        self.rate = rate
        self.minimum = minimum
        self.maximum = maximum
        self.buffer: deque[float] = deque(maxlen=buffer_size)

    def __call__(self, disagreement: torch.Tensor) -> torch.Tensor:
        """The mask `(N,)` of an epoch, bool."""
        doubtful = disagreement[disagreement >= 0]
        mean = doubtful.mean().item()
        if self.buffer:
            factor = 1 + self.rate * ((mean > max(self.buffer)) - (mean < min(self.buffer)))
            self.ratio = min(max(self.ratio * factor, self.minimum), self.maximum)
        self.buffer.append(mean)
        return (disagreement >= torch.quantile(doubtful, 1 - self.ratio)) & (disagreement > 0)

    def state_dict(self) -> dict[str, Any]:
        return {"ratio": self.ratio, "buffer": list(self.buffer)}

    def load_state_dict(self, state: dict[str, Any]):
        self.ratio = state["ratio"]
        self.buffer = deque(state["buffer"], maxlen=self.buffer.maxlen)


class ReferenceSchedule:
    """Says when the current policy becomes the reference: the KL passes `max_kl`, or `max_epochs` have gone by.

    Either may be `None`, which is never.
    """

    def __init__(self, max_kl: float | None, max_epochs: int | None):
        self.max_kl = max_kl
        self.max_epochs = max_epochs
        self.age = 0  # epochs since the last reset

    def step(self, kl: float) -> bool:
        """After an epoch with this mean KL: whether it is time."""
        self.age += 1
        due = (self.max_kl is not None and kl > self.max_kl) or (
            self.max_epochs is not None and self.age >= self.max_epochs
        )
        if due:
            self.age = 0
        return due

    def state_dict(self) -> dict[str, Any]:
        return {"age": self.age}

    def load_state_dict(self, state: dict[str, Any]):
        self.age = state["age"]
