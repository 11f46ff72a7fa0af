"""Bicubic resizing of uint8 frames as Pillow and as torchvision do it, without either."""

from __future__ import annotations

import torch
import torch.nn.functional as F


# CLIP's, which Qwen2-VL has too.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def to_uint8(frames: torch.Tensor) -> torch.Tensor:
    """Frames in [0, 1] as 0 .. 255; those that are uint8 stay as they are."""
    return frames if frames.dtype == torch.uint8 else (frames.float() * 255).round().clamp(0, 255).to(torch.uint8)


def resize_as_pillow(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """`Image.resize(..., BICUBIC)` for uint8 frames [N, C, H, W]: columns first, and each of both passes rounds."""
    across = _interpolate(frames, (frames.shape[-2], size[1]))
    return _interpolate(across, size)


def resize_as_torchvision(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """`torchvision.transforms.functional.resize(..., BICUBIC, antialias=True)` for uint8 frames [N, C, H, W]."""
    return _interpolate(frames, size)


def _interpolate(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if tuple(frames.shape[-2:]) == tuple(size):
        return frames
    resized = F.interpolate(frames.float(), size, mode="bicubic", antialias=True)
    return resized.clamp_(0, 255).round_().to(torch.uint8)


def normalize(frames: torch.Tensor) -> torch.Tensor:
    """uint8 frames [..., 3, H, W] in float32 with CLIP's mean and deviation."""
    mean, std = (frames.new_tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (frames.float() * (1 / 255) - mean) / std
