import pytest
import torch
import torch.nn.functional as F

from astrolabe_diffusers.rewards import RewardSet, get_reward


@pytest.fixture
def texture():
    small = torch.rand(1, 3, 40, 100, generator=torch.Generator().manual_seed(0))
    return F.interpolate(small, (240, 600), mode="bicubic").clamp(0, 1)[0]


def pan(texture, step, frames=5):
    """[F, 3, 240, 416]: the picture moves `step` pixels to the left at each frame."""
    return torch.stack([texture[:, :, i * step : i * step + 416] for i in range(frames)])


def disk(step, frames=5, height=240, width=416):
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    inside = [((x - 60 - i * step) ** 2 + (y - 120) ** 2 < 20**2).float() for i in range(frames)]
    return torch.stack([0.3 + mask * torch.tensor([0.6, -0.2, -0.2]).view(3, 1, 1) for mask in inside])


def score(video, **options):
    return get_reward("dynamic_degree", **options).score(video[None], [""])


@pytest.mark.parametrize("step", [2, 5, 10, 20])
def test_speed_of_a_pan(texture, step):
    # Short sides a second: `step` of 240 pixels, 16 times a second.
    expected = step / 240 * 16
    assert score(pan(texture, step)).scores.item() == pytest.approx(expected, rel=0.1)
    assert score(pan(texture, step), fps=8).scores.item() == pytest.approx(expected / 2, rel=0.1)
    assert score(pan(texture, step)).info["above_threshold"].item() == float(expected > 0.1875)


@pytest.mark.parametrize("size", [(240, 416), (120, 208), (64, 112)])
def test_a_small_object_counts_at_any_resolution(size):
    video = F.interpolate(disk(10), size, mode="bilinear", antialias=True)
    assert score(video).scores.item() == pytest.approx(10 / 240 * 16, rel=0.15)


def test_what_does_not_move_has_none(texture):
    still = pan(texture, 0)
    light = torch.rand(5, 1, 1, 1)
    for video in (still, still * light, light.expand(5, 3, 240, 416), torch.zeros(5, 3, 64, 64), still[:1]):
        assert score(video).scores.item() < 0.03
    noise = (still + 0.02 * torch.randn(still.shape)).clamp(0, 1)
    # Noise has no direction to be found, but is not told apart perfectly.
    assert score(noise).scores.item() < 0.06 and score(torch.rand(5, 3, 240, 416)).scores.item() < 0.1875


def test_faster_is_more_and_a_batch_is_its_members(texture):
    videos = torch.stack([pan(texture, step) for step in (0, 3, 6, 12)])
    scores = RewardSet({"dynamic_degree": 1.0})(videos, [""] * 4).total
    assert scores.diff().min() > 0.1
    torch.testing.assert_close(scores, torch.cat([score(video).scores for video in videos]))


def test_fps_must_be_positive():
    with pytest.raises(ValueError, match="fps"):
        get_reward("dynamic_degree", fps=0)
