"""Noise as the published samplers draw it, so that their seeds give their videos."""

import torch
from diffusers.utils.torch_utils import randn_tensor


# A seed means another video in another layout.
NOISE_LAYOUT = "BFCHW"


def draw_noise(
    shape: tuple[int, int, int, int, int],
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """
    Standard normal noise of `shape` `(B, C, F, h, w)`, float32.

    Drawn with the frames before the channels, as Self-Forcing, Causal-Forcing, LongLive and Krea's server have it in
    memory. Rounded to `dtype`, the model's: on CUDA a bfloat16 draw, which theirs are, is the rounded float32 draw.

    Args:
        generator: a list has one for each video, of which each draws as if it were alone.
    """
    batch_size, channels, num_frames, height, width = shape
    layout = (batch_size, num_frames, channels, height, width)
    noise = randn_tensor(layout, generator=generator, device=device, dtype=torch.float32)
    return noise.to(dtype).float().transpose(1, 2).contiguous()
