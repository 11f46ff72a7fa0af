"""The rewards that need no weights, on natural-like textures and on shapes."""

import pytest
import torch
import torch.nn.functional as F

from astrolabe_diffusers.rewards import get_reward
from tests.rewards.drawn_clips import draw_clip


def texture(height, width, seed=0):
    """A picture [3, height, width] with the falling spectrum of photographs."""
    frequency = (torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.fftfreq(width)[None] ** 2).sqrt()
    noise = torch.randn(3, height, width, generator=torch.Generator().manual_seed(seed))
    picture = torch.fft.ifft2(torch.fft.fft2(noise) / frequency.clamp(min=1 / width) ** 1.2).real
    return (0.5 + 0.15 * picture / picture.std((1, 2), keepdim=True)).clamp(0, 1)


def pan(positions, height=96, width=160):
    picture = texture(height, width + 120)
    return torch.stack([picture[:, :, p : p + width] for p in positions])


STEADY_PAN = pan(range(0, 34, 2))
SHAPES = draw_clip("red", "cross", "white", "right")


def score(name, *videos):
    """The scores of clips [F, 3, H, W], one by one."""
    reward = get_reward(name)
    output = [reward.score(video[None], [""]).scores for video in videos]
    assert all(scores.shape == (1,) and scores.dtype == torch.float32 for scores in output)
    values = [scores.item() for scores in output]
    assert all(0 <= value <= 1 for value in values)
    return values


def falls(values, by):
    return all(later <= earlier - by for earlier, later in zip(values, values[1:]))


def box_blur(video, size):
    return F.avg_pool2d(F.pad(video, (size // 2,) * 4, mode="replicate"), size, 1)


def noisy(video, strength):
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(1))
    return (video + strength * noise).clamp(0, 1)


def flickering(video, strength):
    light = torch.randn(len(video), 1, 1, 1, generator=torch.Generator().manual_seed(2)).clamp(-2, 2)
    return (0.3 + 0.4 * video + strength * light).clamp(0, 1)


@pytest.mark.parametrize("clip", [STEADY_PAN, SHAPES], ids=["pan", "shapes"])
class TestMotionSmoothness:
    def test_steady_motion_is_smooth_and_a_still_perfectly_so(self, clip):
        steady, still = score("motion_smoothness", clip, clip[:1].expand_as(clip))
        assert steady > 0.7 and still == pytest.approx(1)

    def test_falls_when_motion_stutters(self, clip):
        held = clip[[2 * (f // 2) for f in range(len(clip))]]
        shaken = clip[[max(0, min(len(clip) - 1, f + (1, -1, 0)[f % 3])) for f in range(len(clip))]]
        shuffled = clip[torch.randperm(len(clip), generator=torch.Generator().manual_seed(0))]
        steady, held, shaken, shuffled = score("motion_smoothness", clip, held, shaken, shuffled)
        assert max(held, shaken, shuffled) < steady - 0.3
        assert shuffled < held

    def test_falls_with_noise(self, clip):
        assert falls(score("motion_smoothness", clip, *(noisy(clip, s) for s in (0.1, 0.2, 0.4))), by=0.02)

    def test_falls_with_flickering_light(self, clip):
        assert falls(score("motion_smoothness", *(flickering(clip, s) for s in (0, 0.01, 0.05))), by=0.02)


def test_motion_smoothness_of_known_sequences():
    """Frames of one brightness each pattern, written from the formula: no spatial contrast, so only changes count."""

    def plain(levels):
        return torch.tensor(levels)[:, None, None, None].expand(-1, 3, 24, 40)

    ramp, alternating, still = score(
        "motion_smoothness", plain([0.1, 0.2, 0.3, 0.4, 0.5]), plain([0.0, 1.0, 0.0, 1.0]), plain([0.4] * 4)
    )
    assert ramp == pytest.approx(1, abs=1e-4) and still == 1
    assert alternating == pytest.approx(0, abs=1e-4)
    independent = torch.rand(400, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert score("motion_smoothness", independent)[0] == pytest.approx(1 - 0.75**0.5, abs=0.02)


@pytest.mark.parametrize("clip", [STEADY_PAN, SHAPES], ids=["pan", "shapes"])
class TestSharpness:
    def test_falls_with_blur(self, clip):
        values = score("sharpness", clip, *(box_blur(clip, size) for size in (3, 5, 9)))
        assert falls(values, by=0.02) and values[0] > 0.5 and values[-1] < 0.1

    def test_depends_little_on_contrast_and_brightness(self, clip):
        full, faint = score("sharpness", clip, 0.4 + 0.2 * clip)
        assert 0.9 * full < faint <= full

    def test_is_the_mean_over_frames(self, clip):
        half = torch.cat([clip, box_blur(clip, 9)])
        sharp, blurred, both = score("sharpness", clip, box_blur(clip, 9), half)
        assert both == pytest.approx((sharp + blurred) / 2, abs=1e-4)


def test_sharpness_of_a_checkerboard_follows_the_formula():
    """Away from the border the Laplacian of a +-a checkerboard is 8 a, its variance a^2, here 1 / 16."""
    board = (torch.arange(200)[:, None] + torch.arange(200)[None]) % 2 * 0.5
    assert score("sharpness", board.expand(1, 3, 200, 200))[0] == pytest.approx(
        64 / 64.1 / (1 + 16 / 255**2), abs=1e-4
    )


def test_plain_frames_are_not_sharp_whatever_their_noise():
    plain = torch.full((2, 3, 64, 64), 0.7)
    noise = torch.randn(plain[:, :1].shape, generator=torch.Generator().manual_seed(0)).expand_as(plain)
    assert score("sharpness", plain) == [0]
    values = score("sharpness", *(plain + levels * noise / 255 for levels in (0.125, 1, 10)))
    # mean(l^2) of noise is 20 v, but for the borders.
    assert values == pytest.approx([1 / 65, 1 / 2, 100 / 101], abs=0.02)


@pytest.mark.parametrize("clip", [STEADY_PAN, SHAPES], ids=["pan", "shapes"])
def test_flicker_falls_with_the_strength_of_flickering_light(clip):
    assert falls(score("flicker", *(flickering(clip, s) for s in (0, 0.01, 0.03, 0.1))), by=0.05)


def test_flicker_is_not_fooled_by_a_moving_object():
    moving, still = score("flicker", SHAPES, SHAPES[:1].expand_as(SHAPES))
    assert moving > 0.99 and still == pytest.approx(1)


@pytest.mark.parametrize("step, expected", [(0.01, 0.8187), (0.05, 0.3679)])
def test_flicker_of_known_changes(step, expected):
    clip = texture(48, 64)[None] * 0.5 + 0.2 + step * (torch.arange(8) % 2)[:, None, None, None]
    assert score("flicker", clip)[0] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("name", ["motion_smoothness", "sharpness", "flicker"])
def test_a_batch_equals_its_singles(name):
    clips = torch.stack([STEADY_PAN, noisy(STEADY_PAN, 0.1), box_blur(STEADY_PAN, 5), flickering(STEADY_PAN, 0.05)])
    batch = get_reward(name).score(clips, [""] * 4).scores
    torch.testing.assert_close(batch, torch.tensor(score(name, *clips)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["motion_smoothness", "sharpness", "flicker"])
@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (2, 3, 5, 9), (3, 3, 90, 50), (9, 3, 12, 200), (4, 3, 1, 1)])
def test_any_length_and_resolution_gives_a_finite_score(name, shape):
    for clip in (torch.zeros(shape), torch.ones(shape), torch.rand(shape), torch.rand(shape, dtype=torch.bfloat16)):
        score(name, clip)
