"""Which samples are held to the reference policy, and when the reference moves (Astrolabe 3.4, after GARDO)."""

from collections import deque
from collections.abc import Sequence
from dataclasses import InitVar, dataclass
from typing import Any

import torch


def ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks `(N,)` from 1, the lowest value, to N; equal values share the mean of their ranks."""
    lower = (values[:, None] > values[None, :]).sum(1)
    equal = (values[:, None] == values[None, :]).sum(1)
    return lower + (equal + 1) / 2


def rank_disagreement(primary: torch.Tensor, others: Sequence[torch.Tensor]) -> torch.Tensor:
    """`D_i = rank of i by the primary reward - mean of its ranks by the others`, `(N,)`, in (-N, N).

    High where the primary reward alone likes a sample: there it may be hacked. Rewards are `(N,)` without NaN.
    """
    return ranks(primary) - torch.stack([ranks(other) for other in others]).mean(0)


def kl_weights(mask: torch.Tensor, num_parts: int) -> torch.Tensor:
    """Weights `(N,)` with which the mean over all `N` samples is a mean over the selected ones, `mask` `(N,)` bool, of
    each of `num_parts` parts of equal size, and then over the parts. A part without one counts as zero."""
    parts = mask.float().unflatten(0, (num_parts, -1))
    return (parts / parts.mean(1, keepdim=True).clamp(min=1 / parts.shape[1])).flatten()


@dataclass
class RiskController:
    """Chooses the samples that are held to the reference.

    Of the non-negative disagreements those from their `100 (1 - rho)` percentile on, zeros excepted. The risk ratio
    `rho` grows by `rate` of itself when disagreement passes all of the last `buffer_size` epochs, and shrinks when it
    falls below them. What is compared is the mean of the non-negative disagreements: that of all is zero.

    As `released` with Astrolabe, where the best sample has rank 1, all signs are turned round, so that samples are
    held that the primary reward likes *less* than the others do; and only those above the percentile, not at it.
    """

    ratio: float
    rate: float
    minimum: float
    maximum: float
    buffer_size: InitVar[int]
    released: bool = False

    def __post_init__(self, buffer_size: int):
        self.buffer: deque[float] = deque(maxlen=buffer_size)

    def __call__(self, disagreement: torch.Tensor) -> torch.Tensor:
        """The mask `(N,)` of an epoch, bool; `disagreement` is that of [`rank_disagreement`]."""
        if self.released:
            disagreement = -disagreement
        doubtful = disagreement[disagreement >= 0]
        mean = doubtful.mean().item()
        if self.buffer:
            factor = 1 + self.rate * ((mean > max(self.buffer)) - (mean < min(self.buffer)))
            self.ratio = min(max(self.ratio * factor, self.minimum), self.maximum)
        self.buffer.append(mean)
        threshold = torch.quantile(doubtful, 1 - self.ratio)
        return disagreement > threshold if self.released else (disagreement >= threshold) & (disagreement > 0)

    def state_dict(self) -> dict[str, Any]:
        return {"ratio": self.ratio, "buffer": list(self.buffer)}

    def load_state_dict(self, state: dict[str, Any]):
        self.ratio = state["ratio"]
        self.buffer = deque(state["buffer"], maxlen=self.buffer.maxlen)


@dataclass
class ReferenceSchedule:
    """Says when the current policy becomes the reference: the KL passes `max_kl`, or the reference is older than
    `max_epochs`.

    Either may be `None`, which is never. `max_kl` itself may move at a reset, by `kl_step`: down, to `minimum` at
    most, where the reference became older than `max_epochs`; and up, to `maximum` at most, where it was less than
    `early_epochs` old. In the code released with Astrolabe that maximum, 0.05, lies below the start, 0.15: there an
    early reset *lowers* the threshold, at once to 0.05.
    """

    max_kl: float | None
    max_epochs: int | None
    kl_step: float = 0.0
    minimum: float = 0.0
    maximum: float | None = None
    early_epochs: int = 5

    def __post_init__(self):
        self.start_kl = self.max_kl
        self.age = 0  # epochs since the last reset

    def step(self, kl: float) -> bool:
        """After an epoch with this mean KL: whether it is time."""
        self.age += 1
        old = self.max_epochs is not None and self.age > self.max_epochs
        due = old or (self.max_kl is not None and kl > self.max_kl)
        if due:
            if self.max_kl is not None and old:
                self.max_kl = max(self.max_kl - self.kl_step, self.minimum)
            if self.max_kl is not None and self.age < self.early_epochs:
                self.max_kl += self.kl_step
                if self.maximum is not None:
                    self.max_kl = min(self.max_kl, self.maximum)
            self.age = 0
        return due

    def state_dict(self) -> dict[str, Any]:
        return {"age": self.age, "start_kl": self.start_kl, "max_kl": self.max_kl}

    def load_state_dict(self, state: dict[str, Any]):
        self.age = state["age"]
        # Another setting goes before the threshold that came of the old one.
        if state["start_kl"] == self.start_kl:
            self.max_kl = state["max_kl"]
