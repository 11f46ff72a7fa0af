"""Wan's encoder over the weights of `AutoencoderKLWan`: what diffusers' computes, its memory passed explicitly."""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AvgDown3D,
    WanResample,
    WanResidualBlock,
    WanResidualDownBlock,
)
from torch import nn

from .vae_layers import Memory, Pair, add_bias, causal_convolution, middle_block, residual_block
from .vae_operations import add, convolve_images, multiply, patchify


@torch.no_grad()
def encode_piece(vae: AutoencoderKLWan, frames: torch.Tensor, memory: Memory) -> torch.Tensor:
    """The posterior's mean for the next frames of a video, with what is remembered of those before them, which
    `memory` is brought up to.

    `frames` are `(B, 3, F, H, W)`: 1 + 4 n of a video's beginning, afterwards 4 n. The mean is `(B, C, f, h, w)`, as
    `AutoencoderKLWan.encode` has it.
    """
    # Under autocast latents would come back in another dtype than what is remembered.
    with torch.autocast(frames.device.type, enabled=False):
        return _encode_piece(vae, frames, memory)


def _encode_piece(vae: AutoencoderKLWan, frames: torch.Tensor, memory: Memory) -> torch.Tensor:
    encoder, first = vae.encoder, not memory
    x = patchify(frames.permute(0, 2, 3, 4, 1), vae.config.patch_size or 1).contiguous()
    x, bias = causal_convolution(encoder.conv_in, None, x, None, memory)
    for block in encoder.down_blocks:
        x, bias = down_block(block, x, bias, memory, first)
    x = middle_block(encoder.mid_block, x, bias, memory)
    x = add_bias(*causal_convolution(encoder.conv_out, encoder.norm_out, x, None, memory))
    mean, _ = multiply(x, vae.quant_conv).chunk(2, dim=-1)
    return mean.permute(0, 4, 1, 2, 3)


def down_block(block: nn.Module, x: torch.Tensor, bias: torch.Tensor | None, memory: Memory, first: bool) -> Pair:
    """One of the layers of which Wan2.1 has a row, or a `WanResidualDownBlock` of Wan2.2. None is an attention block:
    diffusers' encoder has a place for them, but fails with one."""
    if isinstance(block, WanResidualBlock):
        return residual_block(block, x, bias, memory), None
    x = add_bias(x, bias)
    if isinstance(block, WanResidualDownBlock):
        return residual_down_block(block, x, memory, first), None
    return downsample(block, x, memory, first)


def residual_down_block(block: WanResidualDownBlock, x: torch.Tensor, memory: Memory, first: bool) -> torch.Tensor:
    """Around the block its input goes as well."""
    shortcut, bias = average(block.avg_shortcut, x), None
    for resnet in block.resnets:
        x = residual_block(resnet, x, None, memory)
    if block.downsampler is not None:
        x, bias = downsample(block.downsampler, x, memory, first)
    return add(x, bias, shortcut, None)


def downsample(layer: WanResample, x: torch.Tensor, memory: Memory, first: bool) -> Pair:
    """Half as high and wide and, with a convolution over time, half as many frames; but the video's first stays."""
    conv = layer.resample[1]
    x = F.pad(x, (0, 0, 0, 1, 0, 1))  # a column and a row of zeros, after the last
    x, bias = convolve_images(x, conv.weight.permute(0, 2, 3, 1), conv.bias, padding=0, stride=2)
    if layer.mode == "downsample2d":
        return x, bias
    conv, x = layer.time_conv, add_bias(x, bias)
    frames = x if first else torch.cat([memory[conv], x], dim=1)
    memory[conv] = x[:, -1:].clone()
    # Every three frames begin with the last of the three before, or with the video's first; of that alone, none.
    triples = torch.cat([frames[:, :-2:2], frames[:, 1:-1:2], frames[:, 2::2]], dim=-1)
    x = multiply(triples, conv)
    return (torch.cat([frames[:, :1], x], dim=1) if first else x), None


def average(layer: AvgDown3D, x: torch.Tensor) -> torch.Tensor:
    """Smaller in time and space by means over groups of what comes to lie in the channels. The video's first frame is
    by itself: a frame of zeros comes before it."""
    in_time, in_space = layer.factor_t, layer.factor_s
    x = F.pad(x, (0, 0, 0, 0, 0, 0, x.shape[1] % in_time, 0))
    batch, frames, height, width, channels = x.shape
    x = x.view(batch, frames // in_time, in_time, height // in_space, in_space, width // in_space, in_space, channels)
    x = x.permute(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(*x.shape[:4], layer.out_channels, layer.group_size).mean(dim=-1)
