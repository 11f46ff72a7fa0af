"""A faster norm for the decoders of the tests.

torch takes the norm of a few channels, which do not lie beside each other, on a CPU 40 times as slowly as the root of
the sum of their squares. Half of the time of the tiny decoders, and a tenth of the tests', was spent there.
"""

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm


diffusers_forward = WanRMS_norm.forward


def forward(self: WanRMS_norm, x: torch.Tensor) -> torch.Tensor:
    norm = x.float().square().sum(1 if self.channel_first else -1, keepdim=True).sqrt().clamp_min(1e-12)
    return (x / norm).to(x.dtype) * self.scale * self.gamma + self.bias


WanRMS_norm.forward = forward
