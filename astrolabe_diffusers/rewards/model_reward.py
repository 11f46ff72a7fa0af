"""What rewards that are neural networks share."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import nn

from .frame_selection import FrameSelection, top_fraction_mean
from .image_resize import to_uint8
from .reward import Reward, RewardOutput


DTYPES = ("bfloat16", "float16", "float32")


def place(device: str | None, dtype: str | None) -> tuple[torch.device, torch.dtype]:
    """The device and dtype of a reward's weights: by default the GPU if there is one, in bfloat16, or else the CPU."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or ("float32" if device.type == "cpu" else "bfloat16")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}.")
    return device, getattr(torch, dtype)


class ModelReward(Reward):
    """A reward whose weights are those of `model`; it scores on the device that they are on."""

    model: nn.Module

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: str | torch.device) -> ModelReward:
        """Moves the weights, to make room on a GPU for example. Precision stays."""
        self.model.to(device)
        return self


class FrameReward(ModelReward):
    """
    A reward that scores frames one by one. A video has the mean of the best of them; the mean over all is `mean` in
    `info`.

    Args:
        frames: which frames, see [`FrameSelection`].
        fps: frames a second of the videos.
        top_fraction: the share of the frames, the best ones, whose mean is the score; 1 is the mean over all.
        batch_size: frames in one forward pass.
    """

    def __init__(self, frames: str, fps: float, top_fraction: float, batch_size: int):
        if not 0 < top_fraction <= 1:
            raise ValueError(f"top_fraction must be above 0 and at most 1, not {top_fraction}.")
        self.select = FrameSelection(frames, fps)
        self.top_fraction, self.batch_size = top_fraction, batch_size

    def prepare(self, videos: torch.Tensor) -> torch.Tensor:
        """uint8 [B, F', 3, h, w]: the frames this reward looks at, in the size the model takes.

        `score` takes what comes out of here as well, as it takes no video in uint8 otherwise.
        """
        with torch.inference_mode():
            kept = videos[:, self.select(videos.shape[1])]
            return torch.stack([self.resize(to_uint8(video).to(self.device)) for video in kept])

    def score(self, videos, prompts, metadata=None):
        frames = videos.to(self.device) if videos.dtype == torch.uint8 else self.prepare(videos)
        with torch.inference_mode():
            texts = self.encode_prompts(prompts)
            owners = torch.arange(len(prompts)).repeat_interleave(frames.shape[1]).tolist()
            scores = [
                self.score_frames(part, [texts[i] for i in owners[start : start + len(part)]])
                for start, part in zip(
                    range(0, len(owners), self.batch_size), frames.flatten(0, 1).split(self.batch_size)
                )
            ]
            scores = torch.cat(scores).float().cpu().view(frames.shape[:2])
        # Its clone made out here is no inference tensor.
        scores = scores.clone()
        return RewardOutput(top_fraction_mean(scores, self.top_fraction), {"mean": scores.mean(1)})

    @abstractmethod
    def resize(self, frames: torch.Tensor) -> torch.Tensor:
        """uint8 [N, 3, h, w] of uint8 [N, 3, H, W]."""

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> list[Any]:
        """What `score_frames` wants of each prompt."""

    @abstractmethod
    def score_frames(self, frames: torch.Tensor, texts: list[Any]) -> torch.Tensor:
        """[N] of prepared frames [N, 3, h, w] and what `encode_prompts` made of the prompt of each."""
