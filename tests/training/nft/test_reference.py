"""Selective KL and the moving reference, against cases computed by hand."""

import numpy as np
import pytest
import torch

from astrolabe_diffusers.rollout.samples import process_batches
from astrolabe_diffusers.training.nft.config import NFTConfig
from astrolabe_diffusers.training.nft.reference import (
    ReferenceSchedule,
    RiskController,
    kl_weights,
    rank_disagreement,
    ranks,
)


def controller_of(**settings):
    return RiskController(NFTConfig(**settings))


def schedule_of(kl, epochs, **settings):
    settings = {f"reference_reset_{name}": value for name, value in settings.items()}
    return ReferenceSchedule(NFTConfig(reference_reset_kl=kl, reference_reset_epochs=epochs, **settings))


def test_ranks():
    # From 1 for the lowest; the two equal values have ranks 2 and 3.
    assert ranks(torch.tensor([0.5, 0.1, 0.5, 0.9])).tolist() == [2.5, 1.0, 2.5, 4.0]


def test_rank_disagreement():
    primary = torch.tensor([4.0, 1.0, 2.0, 3.0])  # ranks 4 1 2 3
    others = [torch.tensor([10.0, 20.0, 30.0, 40.0]), torch.tensor([1.0, 3.0, 2.0, 4.0])]  # 1 2 3 4 and 1 3 2 4
    assert rank_disagreement(primary, others).tolist() == [3.0, -1.5, -0.5, -1.0]


def test_what_the_primary_reward_alone_likes_is_held_back():
    """The fifth sample is a hack: best by the primary reward, worst by the other; all else they rank alike."""
    primary = torch.arange(10.0)
    other = torch.arange(10.0)
    primary[4], other[4] = 100.0, -100.0
    mask = controller_of()(rank_disagreement(primary, [other]))
    assert mask.nonzero().flatten().tolist() == [4]


def test_percentile_is_of_the_non_negative_disagreements():
    # Of 0 1 2 3 4 the 70th percentile is 2.8: 3 and 4 are above it. The negative ones do not count.
    mask = controller_of(risk_ratio=0.3, risk_ratio_max=0.9)(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, -5.0, -5.0]))
    assert mask.tolist() == [False, False, False, True, True, False, False]


def test_no_disagreement_holds_nothing_back():
    assert not controller_of()(torch.zeros(5)).any()


def test_risk_ratio_follows_disagreement():
    settings = {"risk_ratio_min": 0.085, "risk_ratio_max": 0.115, "risk_buffer_size": 2}
    controller = controller_of(**settings)
    ratios = []
    for mean in (1.0, 2.0, 1.5, 3.0, 4.0, 0.5, 0.2, 0.1):
        controller(torch.tensor([mean, mean, -5.0]))
        ratios.append(controller.ratio)
    # The first has nothing to compare with; 2 > 1; 1.5 lies between; 3 > {2, 1.5}; 4 > {1.5, 3}, but for the limit;
    # 0.5 < {3, 4}; 0.2 < {4, 0.5}; 0.1 < {0.5, 0.2}, but for the limit.
    assert ratios == pytest.approx([0.1, 0.11, 0.11, 0.115, 0.115, 0.1035, 0.09315, 0.085])
    other = controller_of(**settings)
    other.load_state_dict(controller.state_dict())
    assert (other.ratio, list(other.buffer), other.buffer.maxlen) == (0.085, pytest.approx([0.2, 0.1]), 2)


def test_the_released_rule_holds_what_the_primary_reward_likes_least():
    """The mask from ranks that begin with the best and numpy's percentile, written down plainly."""
    generator = torch.Generator().manual_seed(0)
    primary, *others = torch.randn(3, 60, generator=generator)

    def from_the_best(values):
        return torch.tensor([1.0 + sum(other > value for other in values.tolist()) for value in values.tolist()])

    difference = (from_the_best(primary) - (from_the_best(others[0]) + from_the_best(others[1])) / 2).numpy()
    threshold = np.percentile(difference[difference >= 0], 100 - 100 * 0.1)
    disagreement = rank_disagreement(primary, others)
    mask = controller_of(risk_rule="released")(disagreement)
    assert mask.tolist() == (difference > threshold).tolist() and 0 < mask.sum() < 6
    assert (disagreement[mask] < 0).all()
    ours = controller_of()(disagreement)
    assert (disagreement[ours] > 0).all() and not (ours & mask).any()
    # Those at the percentile are not above it.
    equal = torch.tensor([1.0, 1.0, -2.0, -2.0])
    assert not controller_of(risk_rule="released")(equal).any()


def test_kl_weights():
    mask = torch.tensor([1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0]).bool()
    kl = torch.arange(12.0)
    # All twelve: the mean of samples 0, 2 and 10. Batches of four: means 1, none and 10.
    assert (kl_weights(mask, 1) * kl).mean().item() == pytest.approx((0 + 2 + 10) / 3)
    assert (kl_weights(mask, 3) * kl).mean().item() == pytest.approx((1 + 0 + 10) / 3)
    # The parts are the batches of the processes: two processes with two batches of three each.
    for batches in (process_batches(kl_weights(mask, 4), 3, index, 2) for index in (0, 1)):
        assert all(batch.sum() in (0, 3) for batch in batches) and len(batches) == 2
    assert kl_weights(torch.ones(4).bool(), 2).tolist() == [1.0] * 4
    assert not kl_weights(torch.zeros(4).bool(), 1).any()


def test_reference_schedule():
    schedule = schedule_of(0.15, 3)
    due = [schedule.step(kl) for kl in (0.1, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1)]
    # Above the KL after the second epoch; more than three epochs old after the sixth.
    assert due == [False, True, False, False, False, True, False]
    assert schedule.max_kl == 0.15
    schedule = schedule_of(None, None)
    assert not any(schedule.step(100.0) for _ in range(50)) and schedule.age == 50
    other = schedule_of(None, 50)
    other.load_state_dict(schedule.state_dict())
    assert other.step(0.0)


def released_schedule():
    return schedule_of(0.15, 15, kl_step=0.01, kl_min=0.1, kl_max=0.05, early_epochs=5)


def test_the_released_threshold_moves():
    schedule = released_schedule()
    # Resets of age alone: after 16 epochs, by 0.01 each, to 0.1.
    thresholds = []
    for _ in range(7):
        assert [schedule.step(0.1) for _ in range(16)] == [False] * 15 + [True]
        thresholds.append(schedule.max_kl)
    assert thresholds == pytest.approx([0.14, 0.13, 0.12, 0.11, 0.1, 0.1, 0.1])
    # A reset after 5 to 15 epochs leaves it; an earlier one sets it to 0.05, and age to 0.1 again.
    assert [schedule.step(kl) for kl in (0, 0, 0, 0, 0.11)] == [False] * 4 + [True] and schedule.max_kl == 0.1
    assert [schedule.step(kl) for kl in (0, 0, 0, 0.11)] == [False] * 3 + [True] and schedule.max_kl == 0.05
    assert [schedule.step(0.04) for _ in range(16)][-1] and schedule.max_kl == 0.1
    assert not schedule.step(0.1) and schedule.step(0.11)


def test_the_threshold_survives_a_resume():
    schedule = released_schedule()
    assert schedule.step(0.2) and schedule.max_kl == 0.05
    schedule.step(0.0)
    again = released_schedule()
    again.load_state_dict(schedule.state_dict())
    assert (again.max_kl, again.age) == (0.05, 1)
    changed = schedule_of(0.3, 15, kl_step=0.01, kl_min=0.1, kl_max=0.05)
    changed.load_state_dict(schedule.state_dict())
    assert (changed.max_kl, changed.age) == (0.3, 1)


def test_a_threshold_of_one_s_own_rises_after_an_early_reset():
    schedule = schedule_of(0.15, None, kl_step=0.01)
    assert schedule.step(0.2) and schedule.max_kl == pytest.approx(0.16)
