"""What Wan's encoder and decoder are made of, on `(B, F, H, W, C)`: the passes between matrix products, and the
convolutions in the formulation that is fastest.

Without gradients. A pass that has a Triton kernel in `vae_kernels` runs it on CUDA; here it says what that computes.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .checked_kernels import on_gpu, with_kernel


# Convolutions over time read three frames stacked in the channels, as one convolution of images, but on CUDA for those
# of more channels: there the convolution in three dimensions is as fast, and stacking has no use.
STACKED_CHANNELS = 384


def is_narrow(conv: nn.Conv3d) -> bool:
    """Whether the results of a convolution's three frames, apart, are fewer than what one frame holds: only the last
    convolution, to colours or latents, which then reads every frame once."""
    return 3 * conv.out_channels < conv.in_channels


def is_stacked(conv: nn.Conv3d) -> bool:
    """Whether a convolution reads stacked frames; those of one pixel do in any case, as a product."""
    return not on_gpu(conv.weight) or conv.in_channels <= STACKED_CHANNELS or conv.kernel_size[1:] == (1, 1)


def lay_out(module: nn.Module):
    """Lay out the weights of its convolutions in memory as they are read here; values and shapes stay.

    Weights that come later, or on another device, are read all the same, by way of a copy in every call.
    """
    # Weights that are laid out in inference mode could never be trained again.
    with torch.inference_mode(False):
        _lay_out(module)


def _lay_out(module: nn.Module):
    for conv in module.modules():
        if isinstance(conv, nn.Conv3d):
            order = (0, 3, 4, 2, 1) if is_stacked(conv) else (0, 2, 3, 4, 1)
        elif isinstance(conv, nn.Conv2d):
            order = (0, 2, 3, 1)
        else:
            continue
        weight = conv.weight.permute(order)
        if not weight.is_contiguous():
            conv.weight.data = weight.contiguous().permute([order.index(i) for i in range(len(order))])


def stacked_weight(conv: nn.Conv3d) -> torch.Tensor:
    """`(O, kh, kw, 3 C)`; a view of a weight that is laid out so."""
    return conv.weight.permute(0, 3, 4, 2, 1).flatten(3)


def norm(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """`WanRMS_norm`, whose statistics are float32 at least."""
    return F.rms_norm(x, gamma.shape, gamma, eps=1e-24)


@with_kernel("vae_kernels")
def stack(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    gamma: torch.Tensor | None,
    memory: torch.Tensor | None,
    stacked: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a causal convolution over three frames reads, of its input after a bias and, with a norm's weight `gamma`,
    norm and SiLU.

    `memory` are the two frames before. Returns three frames a frame `(B, F, H, W, 3 C)`, the earliest first, or else
    `(B, 2 + F, H, W, C)`; and the next memory. Without a memory the frames stay by themselves, `(B, F, H, W, C)`.
    """
    if bias is not None:
        x = x + bias
    if gamma is not None:
        x = F.silu(norm(x, gamma), inplace=True)
    if memory is None:
        return x, None
    frames = torch.cat([memory, x], dim=1)
    memory = frames[:, -2:].clone()
    if stacked:
        count = x.shape[1]
        frames = torch.cat([frames[:, i : i + count] for i in range(3)], dim=-1)
    return frames, memory


@with_kernel("vae_kernels")
def add(
    x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, residual_bias: torch.Tensor | None
) -> torch.Tensor:
    """The sum of all, in the memory of `x`."""
    for term in (bias, residual, residual_bias):
        if term is not None:
            x = x.add_(term)
    return x


@with_kernel("vae_kernels")
def spread(x: torch.Tensor, times: int) -> torch.Tensor:
    """Every pixel becomes 2 x 2, and every frame the `times` frames that lie in its channels one after the other:
    `(B, F, H, W, times * C)` -> `(B, times * F, 2 H, 2 W, C)`."""
    batch, frames, height, width, _ = x.shape
    x = x.view(batch, frames, 1, height, 1, width, 1, times, -1).transpose(2, 7)
    x = x.expand(-1, -1, -1, -1, 2, -1, 2, -1, -1)
    return x.reshape(batch, frames * times, 2 * height, 2 * width, -1)


@with_kernel("vae_kernels")
def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Values in [-1, 1] as 0 to 255, to the last bit as diffusers' video processor and rounding to the nearest make
    them."""
    return (x * 0.5 + 0.5).float().mul_(255).round_().byte()


def unpatchify(x: torch.Tensor, patch: int) -> torch.Tensor:
    """`(B, F, H, W, C * patch**2)` -> `(B, F, patch * H, patch * W, C)`; a pixel's column comes before its row."""
    if patch == 1:
        return x
    batch, frames, height, width, _ = x.shape
    x = x.view(batch, frames, height, width, -1, patch, patch).permute(0, 1, 2, 6, 3, 5, 4)
    return x.reshape(batch, frames, patch * height, patch * width, -1)


def patchify(x: torch.Tensor, patch: int) -> torch.Tensor:
    """What `unpatchify` undoes: `(B, F, patch * H, patch * W, C)` -> `(B, F, H, W, C * patch**2)`."""
    x = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, F, H, patch, W, patch, C)
    return x.permute(0, 1, 2, 4, 6, 5, 3).flatten(4)


def convolve_images(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding: int, stride: int = 1
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A convolution of every frame with a weight `(O, kh, kw, C)`, and the bias, if it is still to be added.

    On CUDA torch would add it in a pass of its own; here the pass that follows does.
    """
    later, now = (bias, None) if on_gpu(x) else (None, bias)
    missing = -x.shape[-1] % 8
    if on_gpu(x) and missing:
        # Tensor cores read channels by the eight; those of three pictures are nine.
        x, weight = F.pad(x, (0, missing)), F.pad(weight, (0, missing))
    y = F.conv2d(x.flatten(0, 1).permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), now, stride, padding)
    return y.permute(0, 2, 3, 1).contiguous().unflatten(0, x.shape[:2]), later


def convolve(frames: torch.Tensor, conv: nn.Conv3d) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A causal 3 x 3 x 3 convolution of what `stack` returns, and the bias, if it is still to be added."""
    if is_stacked(conv):
        return convolve_images(frames, stacked_weight(conv), conv.bias, padding=1)
    y = F.conv3d(frames.permute(0, 4, 1, 2, 3), conv.weight, padding=(0, 1, 1))
    return y.permute(0, 2, 3, 4, 1).contiguous(), conv.bias


def convolve_apart(x: torch.Tensor, conv: nn.Conv3d, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A causal 3 x 3 x 3 convolution with its bias, and the next memory: what the last two frames give to themselves
    and to the two frames after each, `(B, 2, H, W, 3 O)`, the latest first."""
    count, frames = conv.out_channels, x.shape[1]
    weight = conv.weight.permute(2, 0, 3, 4, 1).flatten(0, 1)
    if on_gpu(x):
        # Tensor cores compute channels by the eight.
        weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, -len(weight) % 8))
    given = convolve_images(x, weight, None, padding=1)[0][..., : 3 * count]
    given = torch.cat([memory, given], dim=1)
    # In float32 if not finer: so it is rounded once.
    parts = [given[:, i : i + frames, ..., i * count : (i + 1) * count] for i in range(3)]
    total = parts[0].to(torch.promote_types(x.dtype, torch.float32)) + parts[1] + parts[2] + conv.bias
    return total.to(x.dtype), given[:, -2:].clone()


def multiply(x: torch.Tensor, conv: nn.Conv2d | nn.Conv3d) -> torch.Tensor:
    """A convolution of one pixel, or over time alone what `stack` returns."""
    weight = stacked_weight(conv) if isinstance(conv, nn.Conv3d) else conv.weight
    return F.linear(x, weight.flatten(1), conv.bias)
