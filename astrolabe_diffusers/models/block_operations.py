"""The passes between the matrix products of a Wan block, on tokens `(B, L, dim)`.

A pass that has a Triton kernel in `block_kernels` runs it on CUDA where nothing is differentiated; here it says what
that computes. Without torch.compile, which makes as few of them, their launches would take longer than they run.
"""

import torch
import torch.nn.functional as F
from diffusers.models.normalization import FP32LayerNorm
from torch import nn

from .checked_kernels import with_kernel
from .module_calls import is_plain_module
from .rotary import Rotary, apply_rotary


def norm_and_modulate(
    norm: nn.Module, x: torch.Tensor, scale: torch.Tensor | None = None, shift: torch.Tensor | None = None
) -> torch.Tensor:
    """`norm(x) * (1 + scale) + shift`, in float32 and rounded once; scale and shift are `(B, frames or 1, 1, dim)`."""
    if is_plain_module(norm, FP32LayerNorm):
        return layer_norm_and_modulate(x, norm.weight, norm.bias, scale, shift, norm.eps)
    return _modulate(norm(x.float()), scale, shift).type_as(x)


def _modulate(x: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None) -> torch.Tensor:
    return x if scale is None else (_by_frames(x, scale) * (1 + scale) + shift).flatten(1, 2)


def _by_frames(x: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
    return x.unflatten(1, (modulation.shape[1], -1))


@with_kernel("block_kernels")
def layer_norm_and_modulate(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """[`norm_and_modulate`] of a layer norm."""
    weight, bias = (parameter if parameter is None else parameter.float() for parameter in (weight, bias))
    return _modulate(F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps), scale, shift).type_as(x)


@with_kernel("block_kernels")
def add_gated(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """`x + gate * y`, in float32 and rounded once; the gate is `(B, frames or 1, 1, dim)` float32."""
    return (x.float() + (_by_frames(y.float(), gate) * gate).flatten(1, 2)).type_as(x)


def norm_and_rotate(norm: nn.Module, x: torch.Tensor, rotary: Rotary, num_heads: int) -> torch.Tensor:
    """Queries or keys `(B, L, heads, head_dim)` of the norm over all heads, rotated."""
    if is_plain_module(norm, nn.RMSNorm) and norm.weight.dtype == x.dtype:
        return rms_norm_and_rotate(x, norm.weight, *rotary, num_heads, norm.eps)
    return apply_rotary(norm(x).type_as(x).unflatten(2, (num_heads, -1)), rotary)


@with_kernel("block_kernels")
def rms_norm_and_rotate(
    x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int, eps: float
) -> torch.Tensor:
    """[`norm_and_rotate`] of an RMS norm; what it gives is rounded before it is rotated."""
    normed = F.rms_norm(x, x.shape[-1:], weight, eps).type_as(x)  # newer torch gives float32 under autocast
    return apply_rotary(normed.unflatten(2, (num_heads, -1)), (cos, sin))
