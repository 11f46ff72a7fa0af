"""From rewards to advantages."""

from dataclasses import dataclass

import torch


# A group whose rewards differ by less says nothing about which sample is better.
ZERO_SPREAD = 1e-6
# Keeps the quotient finite where the spread is small, as in the published code.
STD_EPSILON = 1e-4


@dataclass
class Advantages:
    """`values`, `valid` (bool) and `groups` are `(N,)`; `group_std` `(G,)` is the spread of each group's rewards.

    A sample that is not valid has no finite reward.
    """

    values: torch.Tensor
    valid: torch.Tensor
    group_std: torch.Tensor
    groups: torch.Tensor

    @property
    def trained(self) -> torch.Tensor:
        """Samples `(N,)` from which something is learnt, bool: those of a group of zero spread are skipped."""
        return self.valid & (self.group_std >= ZERO_SPREAD)[self.groups]

    @property
    def zero_spread(self) -> float:
        """Fraction of groups whose samples all have the same reward."""
        return (self.group_std < ZERO_SPREAD).float().mean().item()


def reward_to_maximise(
    scores: dict[str, torch.Tensor],
    weights: dict[str, float],
    groups: torch.Tensor,
    primary: str | None = None,
    normalization: str = "none",
) -> torch.Tensor:
    """The reward `(N,)` that advantages are made of: the `primary` one of `scores` `(N,)` alone, or the weighted sum;
    NaN where one of them is.

    With the normalization `"group"` each is first centred and divided by its standard deviation in its group, one of
    `groups` `(N,)`, so that a reward with a wide range does not drown the others.
    """
    if primary is not None:
        return scores[primary]
    if normalization == "group":
        scores = {name: group_advantages(scores[name], groups, "group") for name in weights}
        scores = {name: torch.where(a.valid, a.values, torch.nan) for name, a in scores.items()}
    return sum(weight * scores[name] for name, weight in weights.items())


def group_advantages(rewards: torch.Tensor, groups: torch.Tensor, std: str = "global") -> Advantages:
    """Group-relative advantages, Astrolabe (arXiv 2603.17051) eq. 4 and its table S1.

    `A_i = (r_i - mean of i's group) / s`, where `s` is the standard deviation of all rewards (`"global"`), that of the
    group's (`"group"`), or 1 (`"none"`). A group of zero spread has zero advantage. A NaN reward takes no part: it
    counts in no mean or deviation, its advantage is 0 and `valid` is false. `rewards` are `(N,)` float;
    `groups` `(N,)` long, of any size and anywhere.
    """
    valid = ~rewards.isnan()
    # In double precision the mean of equal float32 rewards is exact, and their advantages are exactly zero.
    values = torch.where(valid, rewards, 0.0).double()
    weight = valid.double()
    num_groups = int(groups.max()) + 1

    def group_mean(x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(num_groups, dtype=torch.float64).index_add_(0, groups, x * weight)
        count = torch.zeros(num_groups, dtype=torch.float64).index_add_(0, groups, weight)
        return total / count.clamp(min=1)

    centred = (values - group_mean(values)[groups]) * weight
    group_std = group_mean(centred**2).sqrt()
    if std == "group":
        divisor = group_std[groups] + STD_EPSILON
    elif std == "global":
        divisor = (values[valid].std(correction=0) if valid.any() else 0.0) + STD_EPSILON
    else:
        divisor = 1.0
    return Advantages((centred / divisor).float(), valid, group_std.float(), groups)
