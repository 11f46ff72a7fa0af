"""Selective KL and the moving reference, against cases computed by hand."""

import pytest
import torch

from astrolabe_diffusers.training.reference import ReferenceSchedule, RiskController, rank_disagreement, ranks


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
    mask = RiskController(0.1, 0.1, 0.02, 0.2, 20)(rank_disagreement(primary, [other]))
    assert mask.nonzero().flatten().tolist() == [4]


def test_percentile_is_of_the_non_negative_disagreements():
    # Of 0 1 2 3 4 the 70th percentile is 2.8: 3 and 4 are above it. The negative ones do not count.
    mask = RiskController(0.3, 0.1, 0.02, 0.9, 20)(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, -5.0, -5.0]))
    assert mask.tolist() == [False, False, False, True, True, False, False]


def test_no_disagreement_holds_nothing_back():
    assert not RiskController(0.1, 0.1, 0.02, 0.2, 20)(torch.zeros(5)).any()


def test_risk_ratio_follows_disagreement():
    controller = RiskController(0.1, 0.1, 0.085, 0.115, 2)
    ratios = []
    for mean in (1.0, 2.0, 1.5, 3.0, 4.0, 0.5, 0.2, 0.1):
        controller(torch.tensor([mean, mean, -5.0]))
        ratios.append(controller.ratio)
    # The first has nothing to compare with; 2 > 1; 1.5 lies between; 3 > {2, 1.5}; 4 > {1.5, 3}, but for the limit;
    # 0.5 < {3, 4}; 0.2 < {4, 0.5}; 0.1 < {0.5, 0.2}, but for the limit.
    assert ratios == pytest.approx([0.1, 0.11, 0.11, 0.115, 0.115, 0.1035, 0.09315, 0.085])
    other = RiskController(0.1, 0.1, 0.085, 0.115, 2)
    other.load_state_dict(controller.state_dict())
    assert (other.ratio, list(other.buffer), other.buffer.maxlen) == (0.085, pytest.approx([0.2, 0.1]), 2)


def test_reference_schedule():
    schedule = ReferenceSchedule(max_kl=0.15, max_epochs=3)
    assert [schedule.step(kl) for kl in (0.1, 0.2, 0.1, 0.1, 0.1, 0.1)] == [False, True, False, False, True, False]
    schedule = ReferenceSchedule(None, None)
    assert not any(schedule.step(100.0) for _ in range(50)) and schedule.state_dict() == {"age": 50}
    other = ReferenceSchedule(None, 51)
    other.load_state_dict(schedule.state_dict())
    assert other.step(0.0)
