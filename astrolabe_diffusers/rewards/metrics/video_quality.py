"""Rewards that need no weights and no prompt. Each is easily satisfied by a video of its own kind (a still, noise, a
still again): they are guards beside a reward for content, not goals of their own."""

import torch
import torch.nn.functional as F

from ..registry import register_reward
from ..reward import Reward, RewardOutput


def luminance(videos: torch.Tensor) -> torch.Tensor:
    """[..., H, W] of videos [..., 3, H, W], by Rec. 601."""
    red, green, blue = videos.float().unbind(-3)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def relative_detail(luminance: torch.Tensor) -> torch.Tensor:
    """[B, F] of luminance [B, F, H, W]: the share of fine detail in what a frame has, see [`Sharpness`]."""
    padded = F.pad(luminance, (1, 1, 1, 1), mode="replicate")
    laplacian = padded[..., 1:-1, :-2] + padded[..., 1:-1, 2:] + padded[..., :-2, 1:-1] + padded[..., 2:, 1:-1]
    detail = laplacian.sub_(luminance, alpha=4).square_().mean((2, 3))
    return detail / (detail + luminance.var((2, 3), correction=0) / 10).clamp(min=1e-12)


def _coarse(luminance: torch.Tensor, cells: int) -> torch.Tensor:
    """[B, F, h, w]: means over square cells, about `cells` of them along the short side."""
    size = max(1, min(luminance.shape[-2:]) // cells)
    return F.avg_pool2d(luminance, size, stride=max(1, size // 2))


# The second name is the one in the published settings; what it measured there was not published.
@register_reward("motion_smoothness_score")
@register_reward("motion_smoothness")
class MotionSmoothness(Reward):
    """
    How evenly a video changes: each frame against the mean of its two neighbours, relative to the change there is.

    With y_t the luminance in coarse cells (an eighth of the short side, half overlapping, so that an edge takes a few
    frames to cross one), d = rms of y_{t+1} - y_t, a = rms of y_t - (y_{t-1} + y_{t+1}) / 2 and c the spatial
    standard deviation of y: score = 1 - a / (d + c / 100), in [0, 1]. Steady motion approaches 1, a still video has 1;
    independent frames get 0.13, alternating ones 0; a hard cut costs as any jump does. Below three frames it is 1.
    """

    uses_prompt = False

    def score(self, videos, prompts, metadata=None):
        y = _coarse(luminance(videos), 8)
        if y.shape[1] < 3:
            return RewardOutput(torch.ones(len(y)))
        change = y[:, 1:] - y[:, :-1]
        roughness = (change[:, 1:] - change[:, :-1]).square().mean((1, 2, 3)).sqrt() / 2
        contrast = y.var((2, 3), correction=0).mean(1).sqrt()
        scale = change.square().mean((1, 2, 3)).sqrt() + contrast / 100
        return RewardOutput((1 - roughness / scale.clamp(min=1e-4)).clamp(0, 1).cpu())


@register_reward("sharpness")
class Sharpness(Reward):
    """
    How much of the picture is fine detail.

    Per frame, with l the discrete Laplacian (the four neighbours minus four times the pixel, borders repeated) and v
    the variance of the luminance: score = mean(l^2) / (mean(l^2) + v / 10) * v / (v + c), in [0, 1); the video's score
    is the mean over its frames. c is one gray level squared. Without that factor a frame that is plain but for the
    faintest noise would be the sharpest of all, and a model that is trained on it makes plain frames. It falls with
    blur and does not depend on brightness, and little on contrast. Strong noise counts as detail. Compare videos of
    one resolution only.
    """

    uses_prompt = False

    def score(self, videos, prompts, metadata=None):
        y = luminance(videos)
        variance = y.var((2, 3), correction=0)
        return RewardOutput((relative_detail(y) * variance / (variance + (1 / 255) ** 2)).mean(1).cpu())


@register_reward("flicker")
class Flicker(Reward):
    """
    How steady the light is where nothing moves; higher means LESS flicker.

    With y_t the luminance in coarse cells (a sixteenth of the short side, half overlapping), the change of a frame is
    the mean of |y_{t+1} - y_t| over the half of the cells that change least, f the root mean square of it over the
    frames: score = exp(-f / 0.05), in [0, 1]. A change of all the light by 1 % of the range at every frame gives 0.82,
    by 5 % 0.37. An object that moves costs nothing while it is small; a fast pan of the whole picture does. A single
    frame has 1.
    """

    uses_prompt = False

    def score(self, videos, prompts, metadata=None):
        y = _coarse(luminance(videos), 16)
        if y.shape[1] < 2:
            return RewardOutput(torch.ones(len(y)))
        change = (y[:, 1:] - y[:, :-1]).abs().flatten(2)
        calm = change.topk((change.shape[2] + 1) // 2, dim=2, largest=False, sorted=False).values.mean(2)
        return RewardOutput((-calm.square().mean(1).sqrt() / 0.05).exp().cpu())
