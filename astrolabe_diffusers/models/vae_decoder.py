"""Wan's decoder over the weights of `AutoencoderKLWan`: what diffusers' computes, its memory passed explicitly."""

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import DupUp3D, WanResample, WanResidualUpBlock
from torch import nn

from .vae_layers import Memory, Pair, add_bias, causal_convolution, middle_block, past_frames, residual_block
from .vae_operations import add, convolve_images, multiply, spread, stack


@torch.no_grad()
def decode_piece(vae: AutoencoderKLWan, latents: torch.Tensor, memory: Memory) -> torch.Tensor:
    """The next frames of a video, with what is remembered of those before them, which `memory` is brought up to.

    `latents` are `(B, C, f, h, w)`, as `AutoencoderKLWan.decode` takes them. The frames are `(B, F, H, W, 3)`, not
    clamped yet; with a patch size, their patches `(B, F, H / patch, W / patch, 3 * patch**2)`. F is
    `scale_factor_temporal` for every latent frame, 1 for the video's first.
    """
    # Under autocast frames would come back in another dtype than what is remembered.
    with torch.autocast(latents.device.type, enabled=False):
        return _decode_piece(vae, latents, memory)


def _decode_piece(vae: AutoencoderKLWan, latents: torch.Tensor, memory: Memory) -> torch.Tensor:
    decoder, first = vae.decoder, not memory
    x = multiply(latents.permute(0, 2, 3, 4, 1).contiguous(), vae.post_quant_conv)
    x, bias = causal_convolution(decoder.conv_in, None, x, None, memory)
    x, bias = middle_block(decoder.mid_block, x, bias, memory), None
    for block in decoder.up_blocks:
        x, bias = up_block(block, x, bias, memory, first)
    return add_bias(*causal_convolution(decoder.conv_out, decoder.norm_out, x, bias, memory))


@torch.no_grad()
def decode_piece_by_calls(vae: AutoencoderKLWan, latents: torch.Tensor, memory: Memory) -> torch.Tensor:
    """As [`decode_piece`], by calls of the autoencoder's own modules, whatever these are."""
    first, frames = not memory, []
    if first:
        memory |= dict.fromkeys(range(vae._cached_conv_counts["decoder"]))
    hidden_states = vae.post_quant_conv(latents)
    # The video's first latent frame by itself, as it is not doubled in time.
    for piece in hidden_states.tensor_split([1], dim=2) if first else [hidden_states]:
        if piece.shape[2]:
            frames.append(vae.decoder(piece, feat_cache=memory, feat_idx=[0], first_chunk=first))
        first = False
    return torch.cat(frames, dim=2).permute(0, 2, 3, 4, 1)


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
            frames, memory[conv] = stack(x, None, None, past_frames(conv, x, memory, conv.in_channels), True)
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
