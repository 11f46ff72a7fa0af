"""Which frames of a video a reward looks at and in which size, so that no more than that has to travel."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class FrameRequest:
    """
    The part of videos of one shape that a reward needs: the frames of these indices, brought to each (height, width)
    of `sizes` one after the other, bicubic with antialiasing and rounded each time (two are what Pillow does, columns
    first). With `gray` they have one channel, without colour, which goes before the size changes.
    """

    frames: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...] = ()
    gray: bool = False


def to_uint8(videos: torch.Tensor) -> torch.Tensor:
    """Videos in [0, 1] as 0 .. 255; those that are uint8 stay as they are."""
    return videos if videos.dtype == torch.uint8 else (videos.float() * 255).round_().clamp_(0, 255).to(torch.uint8)


def to_gray(frames: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 1, H, W] of frames [..., 3, H, W], rounded down, as torchvision's `rgb_to_grayscale` has it."""
    red, green, blue = frames.float().unbind(-3)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).to(torch.uint8).unsqueeze(-3)


def prepare_frames(videos: torch.Tensor, request: FrameRequest) -> torch.Tensor:
    """uint8 [B, F', 3, h, w], or [B, F', 1, h, w] in gray: what is requested of videos [B, F, 3, H, W], float in
    [0, 1] or uint8."""
    # A list would copy every frame of a video that is wanted whole.
    every = request.frames == tuple(range(videos.shape[1]))
    kept = to_uint8(videos if every else videos[:, list(request.frames)])
    if request.gray:
        kept = torch.stack([to_gray(video) for video in kept])
    for size in request.sizes:
        if tuple(kept.shape[-2:]) != tuple(size):
            # Video by video: in float32 a batch would be four times as large.
            resized = [F.interpolate(v.float(), size, mode="bicubic", antialias=True) for v in kept]
            kept = torch.stack([v.clamp_(0, 255).round_().to(torch.uint8) for v in resized])
    return kept


class FrameSelection:
    """
    Indices of the frames to look at; a `ValueError` if there is no such rule.

    Args:
        rule: `"all"`; `"stride:K"`, every K-th; `"rate:R"`, every K-th, by the K with which they are nearly R a second
            (VBench's rule); `"count:N"`, N spread evenly over the video, first and last included; or `"fps:R"`, R a
            second of the video, spread evenly, an even number from 4 to 768 (VideoReward's rule).
        fps: frames a second of the videos.
    """

    def __init__(self, rule: str, fps: float = 16.0):
        self.kind, _, number = rule.partition(":")
        try:
            self.number = float(number) if self.kind in ("fps", "rate") else int(number or 1)
            valid = self.kind in ("all", "stride", "rate", "count", "fps") and self.number > 0
        except ValueError:
            valid = False
        if not valid or (self.kind == "all") == bool(number):
            raise ValueError(f"frames must be 'all', 'stride:K', 'rate:R', 'count:N' or 'fps:R', not {rule!r}.")
        if not 0 < fps < math.inf:
            raise ValueError(f"fps, the frames a second of the videos, must be positive, not {fps}.")
        self.fps = fps

    def __call__(self, num_frames: int) -> list[int]:
        if self.kind == "all":
            return list(range(num_frames))
        if self.kind in ("stride", "rate"):
            step = self.number if self.kind == "stride" else max(1, round(self.fps / self.number))
            return list(range(0, num_frames, step))
        count = self.number
        if self.kind == "fps":
            # An even number of frames, as the model sees them in pairs.
            even = round(min(max(num_frames / self.fps * self.number, 4), 768) / 2) * 2
            count = min(even, max(num_frames // 2 * 2, 1))
        return torch.linspace(0, num_frames - 1, min(count, num_frames)).round().int().tolist()


def top_fraction_mean(scores: torch.Tensor, fraction: float) -> torch.Tensor:
    """[B]: the mean of the best `fraction` of scores [B, F], at least one of each row."""
    return scores.topk(max(1, int(fraction * scores.shape[1])), dim=1).values.mean(1)
