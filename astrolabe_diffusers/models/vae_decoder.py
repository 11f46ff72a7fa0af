"""Wan's decoder over the weights of `AutoencoderKLWan`: what diffusers' computes, with its memory passed explicitly.

Hidden states are `(B, F, H, W, C)` in memory. A convolution may leave its bias to the pass after it: such a result
travels as a pair of tensor and bias, or `None`.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    DupUp3D,
    WanAttentionBlock,
    WanCausalConv3d,
    WanResample,
    WanResidualBlock,
    WanResidualUpBlock,
    WanRMS_norm,
)
from torch import nn

from .vae_operations import (
    add,
    convolve,
    convolve_apart,
    convolve_images,
    is_narrow,
    is_stacked,
    multiply,
    norm,
    spread,
    stack,
)


# The last two frames that each causal convolution has read, `(B, 2, H, W, C)`, or what they give to the frames after
# them; of diffusers' decoder its `feat_cache`. Empty before a video's first frame.
Memory = dict[nn.Module, torch.Tensor] | dict[int, torch.Tensor | str | None]
Pair = tuple[torch.Tensor, torch.Tensor | None]


def has_hooks(vae: AutoencoderKLWan) -> bool:
    """Whether a module inside has hooks, as of offloading: its weights may then be anywhere until it is called."""
    modules = (module for name, module in vae.named_modules() if name)
    return any(hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook") for module in modules)


@torch.no_grad()
def decode_piece(vae: AutoencoderKLWan, latents: torch.Tensor, memory: Memory) -> tuple[torch.Tensor, Memory]:
    """The next frames of a video, and what to remember for those after them.

    `latents` are `(B, C, f, h, w)`, as `AutoencoderKLWan.decode` takes them. The frames are `(B, F, H, W, 3)`, not
    clamped yet; with a patch size, their patches `(B, F, H / patch, W / patch, 3 * patch**2)`. F is
    `scale_factor_temporal` for every latent frame, 1 for the video's first.
    """
    # Under autocast frames would come back in another dtype than what is remembered.
    with torch.autocast(latents.device.type, enabled=False):
        return _decode_piece(vae, latents, memory)


def _decode_piece(vae: AutoencoderKLWan, latents: torch.Tensor, memory: Memory) -> tuple[torch.Tensor, Memory]:
    decoder, first, memory = vae.decoder, not memory, dict(memory)
    x = multiply(latents.permute(0, 2, 3, 4, 1).contiguous(), vae.post_quant_conv)
    x, bias = causal_convolution(decoder.conv_in, None, x, None, memory)

    middle = decoder.mid_block
    x = residual_block(middle.resnets[0], x, bias, memory)
    for attention, resnet in zip(middle.attentions, middle.resnets[1:]):
        x = residual_block(resnet, attention_block(attention, x), None, memory)

    bias = None
    for block in decoder.up_blocks:
        x, bias = up_block(block, x, bias, memory, first)

    x, bias = causal_convolution(decoder.conv_out, decoder.norm_out, x, bias, memory)
    return (x if bias is None else x.add_(bias)), memory


@torch.no_grad()
def decode_piece_by_calls(
    vae: AutoencoderKLWan, latents: torch.Tensor, memory: Memory
) -> tuple[torch.Tensor, Memory]:
    """As [`decode_piece`], by diffusers' own modules, for a VAE that [`has_hooks`]."""
    first, memory = not memory, memory or dict.fromkeys(range(vae._cached_conv_counts["decoder"]))
    memory, frames = dict(memory), []
    hidden_states = vae.post_quant_conv(latents)
    # The video's first latent frame by itself, as it is not doubled in time.
    for piece in hidden_states.tensor_split([1], dim=2) if first else [hidden_states]:
        if piece.shape[2]:
            frames.append(vae.decoder(piece, feat_cache=memory, feat_idx=[0], first_chunk=first))
        first = False
    return torch.cat(frames, dim=2).permute(0, 2, 3, 4, 1), memory


def causal_convolution(
    conv: WanCausalConv3d, rms_norm: WanRMS_norm | None, x: torch.Tensor, bias: torch.Tensor | None, memory: Memory
) -> Pair:
    """3 x 3 x 3, after norm and SiLU if there is a norm."""
    gamma = None if rms_norm is None else rms_norm.gamma.flatten()
    if is_narrow(conv):
        x, _ = stack(x, bias, gamma, None, False)
        x, memory[conv] = convolve_apart(x, conv, _past(conv, x, memory, 3 * conv.out_channels))
        return x, None
    frames, memory[conv] = stack(x, bias, gamma, _past(conv, x, memory, conv.in_channels), is_stacked(conv))
    return convolve(frames, conv)


def _past(conv: WanCausalConv3d, x: torch.Tensor, memory: Memory, channels: int) -> torch.Tensor:
    past = memory.get(conv)
    return x.new_zeros(len(x), 2, *x.shape[2:4], channels) if past is None else past


def residual_block(
    block: WanResidualBlock, x: torch.Tensor, bias: torch.Tensor | None, memory: Memory
) -> torch.Tensor:
    if isinstance(block.conv_shortcut, nn.Identity):
        shortcut, shortcut_bias = x, bias
    else:
        x, bias = (x if bias is None else x.add_(bias)), None
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


def up_block(block: nn.Module, x: torch.Tensor, bias: torch.Tensor | None, memory: Memory, first: bool) -> Pair:
    """Wan2.1's `WanUpBlock`, or Wan2.2's `WanResidualUpBlock`, around which its input goes as well."""
    is_residual = isinstance(block, WanResidualUpBlock)
    upsampler = block.upsampler if is_residual else block.upsamplers and block.upsamplers[0]
    entered = x if is_residual else None  # no longer than it is needed
    for resnet in block.resnets:
        x, bias = residual_block(resnet, x, bias, memory), None
    if upsampler is not None:
        x, bias = upsample(upsampler, x, memory, first)
    if is_residual and block.avg_shortcut is not None:
        x, bias = add(x, bias, duplicate(block.avg_shortcut, entered, first), None), None
    return x, bias


def upsample(layer: WanResample, x: torch.Tensor, memory: Memory, first: bool) -> Pair:
    """Twice as high and wide and, with a convolution over time, twice as many frames; but one of the first."""
    if layer.mode == "upsample2d":
        x = spread(x, 1)
    else:
        conv, parts = layer.time_conv, []
        if first:
            # It stays one frame, of which the convolution sees nothing, then or later.
            parts, x = [spread(x[:, :1].contiguous(), 1)], x[:, 1:].contiguous()
        # The kernels cannot be launched for no frames at all.
        if x.shape[1]:
            frames, memory[conv] = stack(x, None, None, _past(conv, x, memory, conv.in_channels), True)
            parts.append(spread(multiply(frames, conv), 2))
        x = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    conv = layer.resample[1]
    return convolve_images(x, conv.weight.permute(0, 2, 3, 1), conv.bias, padding=1)


def duplicate(layer: DupUp3D, x: torch.Tensor, first: bool) -> torch.Tensor:
    """Larger in time and space by spreading groups of channels; of the video's first frame only the last is left."""
    batch, frames, height, width, _ = x.shape
    in_time, in_space = layer.factor_t, layer.factor_s
    x = x[..., None].expand(-1, -1, -1, -1, -1, layer.repeats)
    x = x.reshape(batch, frames, height, width, layer.out_channels, in_time, in_space, in_space)
    x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)
    x = x.reshape(batch, frames * in_time, height * in_space, width * in_space, layer.out_channels)
    return x[:, in_time - 1 :] if first else x
