"""Which frames of a video a reward looks at, and how their scores become one."""

from __future__ import annotations

import math

import torch


# VideoReward's sampler: an even number of frames, as the model sees them in pairs.
_FPS_FRAMES = (4, 768)


class FrameSelection:
    """
    Indices of the frames to look at.

    Args:
        rule: `"all"`; `"stride:K"`, every K-th; `"count:N"`, N spread evenly over the video, first and last included;
            or `"fps:R"`, R a second of the video, spread evenly and an even number of at least 4 (VideoReward's rule).
        fps: frames a second of the videos.

    Raises:
        ValueError: the rule is none of these.
    """

    def __init__(self, rule: str, fps: float = 16.0):
        self.kind, _, number = rule.partition(":")
        try:
            self.number = float(number) if self.kind == "fps" else int(number or 1)
            valid = self.kind in ("all", "stride", "count", "fps") and self.number > 0
        except ValueError:
            valid = False
        if not valid or (self.kind == "all") == bool(number):
            raise ValueError(f"frames must be 'all', 'stride:K', 'count:N' or 'fps:R', not {rule!r}.")
        if not 0 < fps < math.inf:
            raise ValueError(f"fps, the frames a second of the videos, must be positive, not {fps}.")
        self.fps = fps

    def __call__(self, num_frames: int) -> list[int]:
        if self.kind == "all":
            return list(range(num_frames))
        if self.kind == "stride":
            return list(range(0, num_frames, self.number))
        count = self.number
        if self.kind == "fps":
            least, most = _FPS_FRAMES
            even = round(min(max(num_frames / self.fps * self.number, least), most) / 2) * 2
            count = min(even, max(num_frames // 2 * 2, 1))
        return torch.linspace(0, num_frames - 1, min(count, num_frames)).round().int().tolist()


def top_fraction_mean(scores: torch.Tensor, fraction: float) -> torch.Tensor:
    """[B]: the mean of the best `fraction` of scores [B, F], at least one of each row."""
    return scores.topk(max(1, int(fraction * scores.shape[1])), dim=1).values.mean(1)
