"""A context that is encoded anew for every block, as Krea's server has it."""

import copy

import torch
from diffusers import AutoencoderKLWan

from ..models.vae_streaming import encode_video


class ReencodedContext:
    """
    The last `num_frames` latent frames of a video, as the beginning of one.

    Wan's first latent frame stands for a single frame, every other for four. So the frame just before the latents that
    are kept is encoded by itself and stands before them; or, to begin with, the video's own first latent frame.
    """

    def __init__(self, vae: AutoencoderKLWan, num_frames: int):
        self.vae = vae
        self.num_frames = num_frames
        self._first: torch.Tensor | None = None
        self._latents: torch.Tensor | None = None
        self._frames: torch.Tensor | None = None

    def select(self, videos: list[int]) -> "ReencodedContext":
        """A context of its own for some videos of the batch."""
        other = copy.copy(self)
        if self._latents is not None:
            for name in ("_first", "_latents", "_frames"):
                setattr(other, name, getattr(self, name)[videos])
        return other

    def append(self, latents: torch.Tensor, frames: torch.Tensor) -> None:
        """Add a block: latents `(B, C, n, h, w)` and what they decode to, `(B, 3, F, H, W)` in [-1, 1]."""
        if self._latents is None:
            self._first = latents[:, :, :1]
        else:
            latents = torch.cat([self._latents, latents], dim=2)
            frames = torch.cat([self._frames, frames], dim=2)
        self._latents = latents[:, :, -self.num_frames :]
        self._frames = frames[:, :, -(1 + self.vae.config.scale_factor_temporal * (self.num_frames - 1)) :]

    def __call__(self, keep_first: bool) -> torch.Tensor:
        """The context, `(B, C, f, h, w)`, shorter at the video's beginning. With `keep_first` it begins with the
        video's first latent frame, whatever was left out since."""
        first = self._first if keep_first else encode_video(self.vae, self._frames[:, :, :1])
        return torch.cat([first, self._latents[:, :, 1:]], dim=2)
