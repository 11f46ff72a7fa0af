"""Triton kernels of the passes in `block_operations`, where each is described; one reading and one writing of memory.

They compute in float32. A program has a token.
"""

import torch
import triton
import triton.language as tl


def _block(dim: int) -> dict[str, int]:
    block = triton.next_power_of_2(dim)
    return {"DIM": dim, "BLOCK": block, "num_warps": max(1, min(16, block // 512))}


@triton.jit
def _modulation(place, video, frame, by_video, by_frame, channel, inside):
    return tl.load(place + video * by_video + frame * by_frame + channel, inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "frame_tokens"])
def _layer_norm_and_modulate(
    x, out, weight, bias, scale, shift, tokens, frame_tokens, by_video, by_frame, eps,
    AFFINE: tl.constexpr, MODULATED: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, video = tl.program_id(0), tl.program_id(1)
    start = (video.to(tl.int64) * tokens + token) * DIM
    channel = tl.arange(0, BLOCK)
    inside = channel < DIM
    value = tl.load(x + start + channel, inside, other=0.0).to(tl.float32)
    value = tl.where(inside, value - tl.sum(value, axis=0) / DIM, 0.0)
    value = value * (1 / tl.sqrt(tl.sum(value * value, axis=0) / DIM + eps))
    if AFFINE:
        value = value * tl.load(weight + channel, inside, other=0.0).to(tl.float32)
        value += tl.load(bias + channel, inside, other=0.0).to(tl.float32)
    if MODULATED:
        frame = token // frame_tokens
        value = value * (1 + _modulation(scale, video, frame, by_video, by_frame, channel, inside))
        value += _modulation(shift, video, frame, by_video, by_frame, channel, inside)
    tl.store(out + start + channel, value.to(out.dtype.element_ty), inside)


def layer_norm_and_modulate(x, weight, bias, scale, shift, eps):
    x = x.contiguous()
    out = torch.empty_like(x)
    videos, tokens, dim = x.shape
    # What is missing is not read.
    modulation, strides = (x, x), (0, 0)
    if scale is not None:
        modulation = [tensor.expand(videos, -1, -1, -1) for tensor in (scale, shift)]
        strides = modulation[0].stride()[:2]
    parameters = (x, x) if weight is None else (weight, bias)
    frame_tokens = tokens if scale is None else tokens // scale.shape[1]
    flags = weight is not None, scale is not None
    arguments = (x, out, *parameters, *modulation, tokens, frame_tokens, *strides, eps, *flags)
    _layer_norm_and_modulate[(tokens, videos)](*arguments, **_block(dim))
    return out


@triton.jit(do_not_specialize=["tokens", "frame_tokens"])
def _add_gated(
    x, y, gate, out, tokens, frame_tokens, by_video, by_frame, DIM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token, video = tl.program_id(0), tl.program_id(1)
    start = (video.to(tl.int64) * tokens + token) * DIM
    channel = tl.arange(0, BLOCK)
    inside = channel < DIM
    weight = _modulation(gate, video, token // frame_tokens, by_video, by_frame, channel, inside)
    value = tl.load(x + start + channel, inside, other=0.0).to(tl.float32)
    value += weight * tl.load(y + start + channel, inside, other=0.0).to(tl.float32)
    tl.store(out + start + channel, value.to(out.dtype.element_ty), inside)


def add_gated(x, y, gate):
    x, y = x.contiguous(), y.contiguous()
    out = torch.empty_like(x)
    videos, tokens, dim = x.shape
    gate = gate.expand(videos, -1, -1, -1)
    sizes = tokens, tokens // gate.shape[1], *gate.stride()[:2]
    _add_gated[(tokens, videos)](x, y, gate, out, *sizes, **_block(dim))
    return out


@triton.jit(do_not_specialize=["tokens"])
def _rms_norm_and_rotate(
    x, weight, cos, sin, out, tokens, eps, PAIRS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr
):
    # `PAIRS` are those of a head, each two neighbours.
    token, video = tl.program_id(0), tl.program_id(1)
    start = (video.to(tl.int64) * tokens + token) * DIM
    channel = tl.arange(0, BLOCK)
    inside = channel < DIM
    value = tl.load(x + start + channel, inside, other=0.0).to(tl.float32)
    value = value * (1 / tl.sqrt(tl.sum(value * value, axis=0) / DIM + eps))
    value = value * tl.load(weight + channel, inside, other=0.0).to(tl.float32)
    even, odd = tl.split(value.to(out.dtype.element_ty).to(tl.float32).reshape(BLOCK // 2, 2))
    pair = tl.arange(0, BLOCK // 2)
    place = token * PAIRS + pair % PAIRS
    c, s = tl.load(cos + place, 2 * pair < DIM, other=0.0), tl.load(sin + place, 2 * pair < DIM, other=0.0)
    rotated = tl.join(even * c - odd * s, even * s + odd * c).reshape(BLOCK)
    tl.store(out + start + channel, rotated.to(out.dtype.element_ty), inside)


def rms_norm_and_rotate(x, weight, cos, sin, num_heads, eps):
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    videos, tokens, dim = x.shape
    out = x.new_empty(videos, tokens, num_heads, dim // num_heads)
    _rms_norm_and_rotate[(tokens, videos)](x, weight, cos, sin, out, tokens, eps, cos.shape[-1], **_block(dim))
    return out
