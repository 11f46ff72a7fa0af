"""A context that is encoded anew for every block, as Krea's server has it."""

import copy

import torch
from diffusers import AutoencoderKLWan

from ..models.vae_streaming import encode_video


class ReencodedContext:
    """
    The last latent frames of a video, as the beginning of one.

    Wan's first latent frame stands for a single frame, every other for four. So once earlier latents are left out, the
    frame just before those that are kept is encoded by itself and takes their place.

    Args:
        vae ([`AutoencoderKLWan`]): encodes that frame.
        num_frames (`int`): latent frames of the context.
    """

    def __init__(self, vae: AutoencoderKLWan, num_frames: int):
        self.vae = vae
        self.num_frames = num_frames
        self._total = 0
        self._latents: torch.Tensor | None = None
        self._frames: torch.Tensor | None = None

    def select(self, videos: list[int]) -> "ReencodedContext":
        """A context of its own for some videos of the batch."""
        other = copy.copy(self)
        if self._latents is not None:
            other._latents, other._frames = self._latents[videos], self._frames[videos]
        return other

    def append(self, latents: torch.Tensor, frames: torch.Tensor) -> None:
        """Add a block: latents `(B, C, n, h, w)` and what they decode to, `(B, 3, F, H, W)` in [-1, 1]."""
        if self._latents is not None:
            latents = torch.cat([self._latents, latents], dim=2)
            frames = torch.cat([self._frames, frames], dim=2)
        self._total += latents.shape[2] - (0 if self._latents is None else self._latents.shape[2])
        self._latents = latents[:, :, -self.num_frames :]
        self._frames = frames[:, :, -(1 + self.vae.config.scale_factor_temporal * (self.num_frames - 1)) :]

    def __call__(self) -> torch.Tensor:
        """The context, `(B, C, f, h, w)`: `num_frames` latent frames, fewer at the video's beginning."""
        if self._total <= self.num_frames:
            return self._latents
        return torch.cat([encode_video(self.vae, self._frames[:, :, :1]), self._latents[:, :, 1:]], dim=2)
