import math

import numpy as np
import pytest
import torch

from astrolabe_diffusers.training.advantages import group_advantages


GROUPS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
REWARDS = torch.tensor([0.1, 0.5, 0.3, 2.0, 1.0, 0.0, 0.7, 0.9])


def reference(rewards, groups, std):
    """Plain numpy, group by group."""
    rewards, groups = rewards.numpy().astype(np.float64), groups.numpy()
    out = np.zeros_like(rewards)
    for g in np.unique(groups):
        member = groups == g
        divisor = {"global": rewards.std() + 1e-4, "group": rewards[member].std() + 1e-4, "none": 1.0}[std]
        out[member] = (rewards[member] - rewards[member].mean()) / divisor
    return out


@pytest.mark.parametrize("std", ["global", "group", "none"])
def test_advantages_are_the_formula(std):
    advantages = group_advantages(REWARDS, GROUPS, std)
    np.testing.assert_allclose(advantages.values.numpy(), reference(REWARDS, GROUPS, std), rtol=1e-5)
    np.testing.assert_allclose(advantages.group_std[0], np.std([0.1, 0.5, 0.3]), rtol=1e-5)
    assert advantages.valid.all() and advantages.zero_spread == 0


@pytest.mark.parametrize("std", ["global", "group", "none"])
def test_members_of_a_group_may_lie_anywhere(std):
    order = torch.tensor([5, 0, 7, 3, 1, 6, 4, 2])
    shuffled = group_advantages(REWARDS[order], GROUPS[order], std)
    torch.testing.assert_close(shuffled.values, group_advantages(REWARDS, GROUPS, std).values[order])


@pytest.mark.parametrize("std", ["global", "group", "none"])
def test_group_without_spread_has_zero_advantage_and_is_counted(std):
    rewards = torch.tensor([0.1, 0.1, 0.1, 2.0, 1.0, 0.0, 0.7, 0.7])  # 0.1 has no exact mean in binary
    advantages = group_advantages(rewards, GROUPS, std)
    assert advantages.values[[0, 1, 2, 6, 7]].eq(0).all()
    assert advantages.values[3] > 0 > advantages.values[5]
    assert advantages.zero_spread == pytest.approx(2 / 3)


def test_constant_rewards_give_zero_and_no_nan():
    advantages = group_advantages(torch.ones(8), GROUPS, "global")
    assert advantages.values.eq(0).all() and advantages.zero_spread == 1


@pytest.mark.parametrize("std", ["global", "group", "none"])
def test_nan_takes_no_part(std):
    rewards = REWARDS.clone()
    rewards[1] = math.nan
    keep = torch.tensor([0, 2, 3, 4, 5, 6, 7])
    advantages = group_advantages(rewards, GROUPS, std)
    assert advantages.valid.tolist() == [True, False] + [True] * 6
    assert advantages.values[1] == 0
    np.testing.assert_allclose(advantages.values[keep].numpy(), reference(REWARDS[keep], GROUPS[keep], std), rtol=1e-5)


def test_group_of_nothing_but_nan():
    rewards = REWARDS.clone()
    rewards[6:] = math.nan
    advantages = group_advantages(rewards, GROUPS, "group")
    assert advantages.values.isfinite().all() and not advantages.valid[6:].any()
