"""What Wan's encoder and decoder are both made of, over the weights of `AutoencoderKLWan` and without its calls.

Hidden states are `(B, F, H, W, C)` in memory. A convolution may leave its bias to the pass after it: such a result
travels as a pair of tensor and bias, or `None`. What a layer remembers of the frames before it reads and writes in a
`Memory` that is passed along.
"""

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanMidBlock,
    WanResidualBlock,
    WanRMS_norm,
)
from torch import nn

from .vae_operations import add, convolve, convolve_apart, is_narrow, is_stacked, multiply, norm, stack


# The last two frames that each causal convolution has read, `(B, 2, H, W, C)`, or what they give to the frames after
# them; of one that takes every other frame the last. Of diffusers' decoder its `feat_cache`. Empty before a video's
# first frame.
Memory = dict[nn.Module, torch.Tensor] | dict[int, torch.Tensor | str | None]
Pair = tuple[torch.Tensor, torch.Tensor | None]


def add_bias(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A pair as one tensor, in the memory of `x`."""
    return x if bias is None else x.add_(bias)


def causal_convolution(
    conv: WanCausalConv3d, rms_norm: WanRMS_norm | None, x: torch.Tensor, bias: torch.Tensor | None, memory: Memory
) -> Pair:
    """3 x 3 x 3, after norm and SiLU if there is a norm."""
    gamma = None if rms_norm is None else rms_norm.gamma.flatten()
    if is_narrow(conv):
        x, _ = stack(x, bias, gamma, None, False)
        x, memory[conv] = convolve_apart(x, conv, past_frames(conv, x, memory, 3 * conv.out_channels))
        return x, None
    frames, memory[conv] = stack(x, bias, gamma, past_frames(conv, x, memory, conv.in_channels), is_stacked(conv))
    return convolve(frames, conv)


def past_frames(conv: WanCausalConv3d, x: torch.Tensor, memory: Memory, channels: int) -> torch.Tensor:
    past = memory.get(conv)
    return x.new_zeros(len(x), 2, *x.shape[2:4], channels) if past is None else past


def residual_block(
    block: WanResidualBlock, x: torch.Tensor, bias: torch.Tensor | None, memory: Memory
) -> torch.Tensor:
    if isinstance(block.conv_shortcut, nn.Identity):
        shortcut, shortcut_bias = x, bias
    else:
        x, bias = add_bias(x, bias), None
        shortcut, shortcut_bias = multiply(x, block.conv_shortcut), None
    x, bias = causal_convolution(block.conv1, block.norm1, x, bias, memory)
    x, bias = causal_convolution(block.conv2, block.norm2, x, bias, memory)
    return add(x, bias, shortcut, shortcut_bias)


def attention_block(block: WanAttentionBlock, x: torch.Tensor) -> torch.Tensor:
    """Every frame by itself, a single head."""
    frames = x.flatten(2, 3).flatten(0, 1)[:, None]  # (B * F, 1, H * W, C)
    query, key, value = multiply(norm(frames, block.norm.gamma.flatten()), block.to_qkv).chunk(3, dim=-1)
    attended = F.scaled_dot_product_attention(query, key, value)
    return add(multiply(attended, block.proj).view_as(x), None, x, None)


def middle_block(block: WanMidBlock, x: torch.Tensor, bias: torch.Tensor | None, memory: Memory) -> torch.Tensor:
    x = residual_block(block.resnets[0], x, bias, memory)
    for attention, resnet in zip(block.attentions, block.resnets[1:]):
        x = residual_block(resnet, attention_block(attention, x), None, memory)
    return x
