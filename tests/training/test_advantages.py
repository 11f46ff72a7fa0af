import math

import numpy as np
import pytest
import torch

from astrolabe_diffusers.training.advantages import group_advantages, reward_to_maximise


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
    assert advantages.trained.tolist() == [False] * 3 + [True] * 3 + [False] * 2 and advantages.valid.all()


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


def test_reward_to_maximise():
    """Two rewards of very different range: in the plain sum one drowns the other, standardised both count."""
    scores = {"a": REWARDS, "b": 1000 * torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0, 2.0, 5.0, 4.0])}
    weights = {"a": 2.0, "b": 0.5}
    plain = reward_to_maximise(scores, weights, GROUPS)
    torch.testing.assert_close(plain, 2 * scores["a"] + 0.5 * scores["b"])
    assert reward_to_maximise(scores, weights, GROUPS, primary="a") is scores["a"]
    standardised = reward_to_maximise(scores, weights, GROUPS, normalization="group").numpy()
    a, b = (reference(scores[name], GROUPS, "group") for name in ("a", "b"))
    np.testing.assert_allclose(standardised, 2 * a + 0.5 * b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("normalization", ["none", "group"])
def test_a_missing_score_makes_the_sum_missing(normalization):
    scores = {"a": REWARDS.clone(), "b": REWARDS.clone()}
    scores["b"][2] = math.nan
    result = reward_to_maximise(scores, {"a": 1.0, "b": 1.0}, GROUPS, normalization=normalization)
    assert result.isnan().tolist() == [i == 2 for i in range(8)]
