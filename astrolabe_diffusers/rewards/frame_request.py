"""What of a video a reward looks at, so that no more than that has to travel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class FrameRequest:
    """
    The part of videos of one shape that a reward needs.

    Attributes:
        frames: indices of the frames.
        sizes: (height, width) to which they are brought one after the other, bicubic with antialiasing and rounded
            each time: none leaves them as they are, two are what Pillow does, columns first.
        gray: without colour, in one channel; the colour goes before the size changes.
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
