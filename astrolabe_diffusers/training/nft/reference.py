"""Which samples are held to the reference policy, and when the reference moves (Astrolabe 3.4, after GARDO)."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from .config import NFTConfig


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


class RiskController:
    """Chooses the samples that are held to the reference.

    Of the non-negative disagreements those from their `100 (1 - risk_ratio)` percentile on, zeros excepted. The ratio
    grows by `risk_ratio_rate` of itself when disagreement passes all of the last `risk_buffer_size` epochs, and
    shrinks when it falls below them. What is compared is the mean of the non-negative disagreements: that of all is
    zero.

    As released with Astrolabe, where the best sample has rank 1, all signs are turned round, so that samples are
    held that the primary reward likes *less* than the others do; and only those above the percentile, not at it.
    """

    def __init__(self, config: NFTConfig):
        self.config = config
        self.ratio = config.risk_ratio
        self.buffer: deque[float] = deque(maxlen=config.risk_buffer_size)

    def __call__(self, disagreement: torch.Tensor) -> torch.Tensor:
        """The mask `(N,)` of an epoch, bool; `disagreement` is that of [`rank_disagreement`]."""
        config, released = self.config, self.config.risk_rule == "released"
        if released:
            disagreement = -disagreement
        doubtful = disagreement[disagreement >= 0]
        mean = doubtful.mean().item()
        if self.buffer:
            factor = 1 + config.risk_ratio_rate * ((mean > max(self.buffer)) - (mean < min(self.buffer)))
            self.ratio = min(max(self.ratio * factor, config.risk_ratio_min), config.risk_ratio_max)
        self.buffer.append(mean)
        threshold = torch.quantile(doubtful, 1 - self.ratio)
        return disagreement > threshold if released else (disagreement >= threshold) & (disagreement > 0)

    def state_dict(self) -> dict[str, Any]:
        return {"ratio": self.ratio, "buffer": list(self.buffer)}

    def load_state_dict(self, state: dict[str, Any]):
        self.ratio = state["ratio"]
        self.buffer = deque(state["buffer"], maxlen=self.buffer.maxlen)


class ReferenceSchedule:
    """Says when the current policy becomes the reference, by the settings `reference_reset_...`.

    In the code released with Astrolabe the highest threshold of the KL, 0.05, lies below the first, 0.15: there an
    early reset *lowers* it, at once to 0.05.
    """

    def __init__(self, config: NFTConfig):
        self.config = config
        self.max_kl = config.reference_reset_kl
        self.age = 0  # epochs since the last reset

    def step(self, kl: float) -> bool:
        """After an epoch with this mean KL: whether it is time."""
        config = self.config
        self.age += 1
        old = config.reference_reset_epochs is not None and self.age > config.reference_reset_epochs
        due = old or (self.max_kl is not None and kl > self.max_kl)
        if due:
            if self.max_kl is not None and old:
                self.max_kl = max(self.max_kl - config.reference_reset_kl_step, config.reference_reset_kl_min)
            if self.max_kl is not None and self.age < config.reference_reset_early_epochs:
                self.max_kl += config.reference_reset_kl_step
                if config.reference_reset_kl_max is not None:
                    self.max_kl = min(self.max_kl, config.reference_reset_kl_max)
            self.age = 0
        return due

    def state_dict(self) -> dict[str, Any]:
        return {"age": self.age, "start_kl": self.config.reference_reset_kl, "max_kl": self.max_kl}

    def load_state_dict(self, state: dict[str, Any]):
        self.age = state["age"]
        # Another setting goes before the threshold that came of the old one.
        if state["start_kl"] == self.config.reference_reset_kl:
            self.max_kl = state["max_kl"]
