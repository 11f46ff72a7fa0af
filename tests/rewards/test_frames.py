import numpy as np
import pytest
import torch
from PIL import Image

from astrolabe_diffusers.rewards.frames import FrameRequest, FrameSelection, prepare_frames, top_fraction_mean
from tests.rewards.slow_resize import resize


def test_frames_and_rounding():
    videos = torch.rand(2, 5, 3, 6, 8)
    frames = prepare_frames(videos, FrameRequest((4, 0)))
    expected = np.round(videos[:, [4, 0]].double().numpy() * 255)
    assert frames.dtype == torch.uint8 and np.array_equal(frames.numpy(), expected)


def test_what_was_prepared_stays_as_it_is():
    frames = torch.randint(0, 256, (2, 3, 3, 6, 8), dtype=torch.uint8)
    request = FrameRequest((0, 1, 2), ((6, 8),))
    assert torch.equal(prepare_frames(frames.float() / 255, request), frames)
    assert torch.equal(prepare_frames(frames, request), frames)


def test_two_sizes_are_what_pillow_does():
    frames = torch.randint(0, 256, (1, 2, 3, 40, 60), dtype=torch.uint8)
    small = prepare_frames(frames, FrameRequest((0, 1), ((40, 17), (23, 17))))[0]
    for frame, expected in zip(small, frames[0]):
        image = Image.fromarray(expected.permute(1, 2, 0).numpy()).resize((17, 23), Image.Resampling.BICUBIC)
        difference = np.abs(frame.permute(1, 2, 0).numpy().astype(int) - np.asarray(image))
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_colour_goes_before_the_size_changes():
    """As published: 256 steps, gray rounded down, then one resize that is rounded to the nearest."""
    videos = torch.rand(2, 3, 3, 60, 100, generator=torch.Generator().manual_seed(0))
    colours = np.round(videos[:, [0, 2]].double().numpy() * 255)
    gray = np.floor(np.tensordot(colours, [0.2989, 0.587, 0.114], axes=([2], [0])))[:, :, None]
    expected = np.clip(np.round(resize(gray, 28, 56)), 0, 255)
    frames = prepare_frames(videos, FrameRequest((0, 2), ((28, 56),), gray=True)).numpy()
    assert frames.shape == (2, 2, 1, 28, 56) and frames.dtype == np.uint8
    assert np.array_equal(frames, expected)
    small = np.clip(np.round(resize(colours, 28, 56)), 0, 255)
    other_order = np.floor(np.tensordot(small, [0.2989, 0.587, 0.114], axes=([2], [0])))[:, :, None]
    assert (frames != other_order).mean() > 0.1


@pytest.mark.parametrize(
    "rule, num_frames, expected",
    [
        ("all", 4, [0, 1, 2, 3]),
        ("stride:4", 9, [0, 4, 8]),
        ("stride:4", 3, [0]),
        ("rate:8", 9, [0, 2, 4, 6, 8]),
        ("rate:6", 7, [0, 3, 6]),
        ("rate:30", 3, [0, 1, 2]),
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
    assert [FrameSelection("rate:8", fps=fps)(9)[1] for fps in (5, 16, 24, 30)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "rule", ["", "some", "all:2", "stride", "stride:0", "stride:x", "count:1.5", "fps:", "fps:-1", "rate:0"]
)
def test_other_rules_are_refused(rule):
    with pytest.raises(ValueError, match="'all', 'stride:K', 'rate:R', 'count:N' or 'fps:R', not"):
        FrameSelection(rule, fps=16)


def test_fps_must_be_positive():
    with pytest.raises(ValueError, match="fps.*must be positive, not 0"):
        FrameSelection("all", fps=0)


def test_top_fraction_mean():
    scores = torch.tensor([[1.0, 5.0, 3.0, 2.0, 4.0, 0.0, 0.0], [7.0, 7.0, 7.0, 7.0, 7.0, 7.0, 8.0]])
    assert top_fraction_mean(scores, 0.3).tolist() == [4.5, 7.5]  # two of seven
    assert top_fraction_mean(scores, 0.01).tolist() == [5, 8]
    torch.testing.assert_close(top_fraction_mean(scores, 1.0), scores.mean(1))
