import pytest
import torch

from astrolabe_diffusers.rewards.frame_selection import FrameSelection, top_fraction_mean


@pytest.mark.parametrize(
    "rule, num_frames, expected",
    [
        ("all", 4, [0, 1, 2, 3]),
        ("stride:4", 9, [0, 4, 8]),
        ("stride:4", 3, [0]),
        ("count:3", 9, [0, 4, 8]),
        ("count:1", 9, [0]),
        ("count:20", 3, [0, 1, 2]),
        # 81 / 16 s at two a second are 10.1 frames.
        ("fps:2", 81, [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]),
        ("fps:2", 12, [0, 4, 7, 11]),  # never fewer than four,
        ("fps:2", 3, [0, 2]),  # unless there are not so many,
        ("fps:2", 1, [0]),
        ("fps:0.5", 321, [0, 36, 71, 107, 142, 178, 213, 249, 284, 320]),
    ],
)
def test_indices(rule, num_frames, expected):
    assert FrameSelection(rule, fps=16)(num_frames) == expected


def test_the_rate_of_the_videos_counts():
    assert len(FrameSelection("fps:2", fps=8)(81)) == 20
    assert len(FrameSelection("fps:2", fps=16)(1600)) == 200
    assert len(FrameSelection("fps:2", fps=1)(1600)) == 768


@pytest.mark.parametrize(
    "rule", ["", "some", "all:2", "stride", "stride:0", "stride:x", "count:1.5", "fps:", "fps:-1"]
)
def test_other_rules_are_refused(rule):
    with pytest.raises(ValueError, match="'all', 'stride:K', 'count:N' or 'fps:R', not"):
        FrameSelection(rule, fps=16)


def test_fps_must_be_positive():
    with pytest.raises(ValueError, match="fps.*must be positive, not 0"):
        FrameSelection("all", fps=0)


def test_top_fraction_mean():
    scores = torch.tensor([[1.0, 5.0, 3.0, 2.0, 4.0, 0.0, 0.0], [7.0, 7.0, 7.0, 7.0, 7.0, 7.0, 8.0]])
    assert top_fraction_mean(scores, 0.3).tolist() == [4.5, 7.5]  # two of seven
    assert top_fraction_mean(scores, 0.01).tolist() == [5, 8]
    torch.testing.assert_close(top_fraction_mean(scores, 1.0), scores.mean(1))
