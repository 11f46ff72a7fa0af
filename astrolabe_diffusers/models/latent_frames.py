"""Frames and latent frames: the first latent frame of a video is one frame, every other `scale_factor_temporal`."""

from diffusers import AutoencoderKLWan


def num_frames_of(vae: AutoencoderKLWan, num_latents: int) -> int:
    """Frames of a video of so many latent frames; as many are before the one that follows."""
    return max(1 + vae.config.scale_factor_temporal * (num_latents - 1), 0)


def num_latents_of(vae: AutoencoderKLWan, num_frames: int) -> int:
    """Latent frames of a video of so many frames; those after the last 1 + 4 n, at four a latent frame, are none's."""
    return (num_frames - 1) // vae.config.scale_factor_temporal + 1
