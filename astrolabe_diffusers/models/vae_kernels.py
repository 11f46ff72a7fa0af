"""Triton kernels of the passes in `vae_operations`, where each is described; one reading and one writing of memory.

They compute in float32 and round once. A program has a tile of pixels with all their channels.
"""

import torch
import triton
import triton.language as tl


TILE = 4096  # values that a program has at a time


def _tile(channels: int) -> dict[str, int]:
    block = triton.next_power_of_2(channels)
    return {"CHANNELS": channels, "BLOCK_C": block, "BLOCK_P": max(1, TILE // block)}


@triton.jit(do_not_specialize=["num_frames", "pixels"])
def _stack(
    x, bias, gamma, memory, out, new_memory, num_frames, pixels,
    HAS_BIAS: tl.constexpr, NORM: tl.constexpr, HAS_MEMORY: tl.constexpr, STACKED: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    # A program goes through the frames: the three that lie side by side it writes at the same time, from registers.
    video = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK_P
    pixel, channel = tl.arange(0, BLOCK_P)[:, None], tl.arange(0, BLOCK_C)[None, :]
    mask = (first + pixel < pixels) & (channel < CHANNELS)
    inside = pixel * CHANNELS + channel
    step = pixels.to(tl.int64) * CHANNELS  # from frame to frame
    x += video * num_frames * step + first * CHANNELS
    memory += video * 2 * step + first * CHANNELS
    new_memory += video * 2 * step + first * CHANNELS
    if STACKED:
        out += (video * num_frames * step + first * CHANNELS) * 3
    elif HAS_MEMORY:
        out += video * (num_frames + 2) * step + first * CHANNELS
    else:
        out += video * num_frames * step + first * CHANNELS
    if HAS_BIAS:
        shift = tl.load(bias + channel, channel < CHANNELS, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.load(gamma + channel, channel < CHANNELS, other=0.0).to(tl.float32)
    if HAS_MEMORY:
        before_last = tl.load(memory + inside, mask, other=0.0)
        last = tl.load(memory + step + inside, mask, other=0.0)
        if not STACKED:
            tl.store(out + inside, before_last, mask)
            tl.store(out + step + inside, last, mask)
            out += 2 * step
    for _ in range(num_frames):
        wide = tl.load(x + inside, mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            wide += shift
        if NORM:
            square = tl.sum(wide * wide, axis=1)[:, None] / CHANNELS
            wide = wide * (1 / tl.sqrt(square + 1e-24)) * scale
            wide = wide * tl.sigmoid(wide)
        value = wide.to(x.dtype.element_ty)
        if STACKED:
            target = out + pixel * (3 * CHANNELS) + channel
            tl.store(target, before_last, mask)
            tl.store(target + CHANNELS, last, mask)
            tl.store(target + 2 * CHANNELS, value, mask)
            out += 3 * step
        else:
            tl.store(out + inside, value, mask)
            out += step
        if HAS_MEMORY:
            before_last = last
            last = value
        x += step
    if HAS_MEMORY:
        tl.store(new_memory + inside, before_last, mask)
        tl.store(new_memory + step + inside, last, mask)


def stack(x, bias, gamma, memory, stacked):
    x = x.contiguous()
    batch, frames, height, width, channels = x.shape
    has_memory = memory is not None
    stacked = stacked and has_memory
    shape = (frames, height, width, 3 * channels) if stacked else (frames + 2 * has_memory, height, width, channels)
    out = x.new_empty(batch, *shape)
    new_memory = x.new_empty(batch, 2, height, width, channels) if has_memory else None
    tile = _tile(channels)
    grid = (triton.cdiv(height * width, tile["BLOCK_P"]), batch)
    # What is missing is not read.
    memories = (memory.contiguous(), new_memory) if has_memory else (x, x)
    arguments = (x, x if bias is None else bias, x if gamma is None else gamma, memories[0], out, memories[1])
    flags = bias is not None, gamma is not None, has_memory, stacked
    _stack[grid](*arguments, frames, height * width, *flags, **tile)
    return out, new_memory


@triton.jit
def _add(
    x, bias, residual, residual_bias, pixels,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL_BIAS: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK_P
    pixel, channel = tl.arange(0, BLOCK_P)[:, None], tl.arange(0, BLOCK_C)[None, :]
    mask = (first + pixel < pixels) & (channel < CHANNELS)
    place = first * CHANNELS + (pixel * CHANNELS + channel)
    value = tl.load(x + place, mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + channel, channel < CHANNELS, other=0.0).to(tl.float32)
    value += tl.load(residual + place, mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL_BIAS:
        value += tl.load(residual_bias + channel, channel < CHANNELS, other=0.0).to(tl.float32)
    tl.store(x + place, value.to(x.dtype.element_ty), mask)


def add(x, bias, residual, residual_bias):
    residual = residual.contiguous()
    tile, pixels = _tile(x.shape[-1]), x[..., 0].numel()
    flags = bias is not None, residual_bias is not None
    biases = (x if bias is None else bias), (x if residual_bias is None else residual_bias)
    _add[(triton.cdiv(pixels, tile["BLOCK_P"]),)](x, biases[0], residual, biases[1], pixels, *flags, **tile)
    return x


@triton.jit
def _spread(
    x, out, height, width, TIMES: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):
    frame = tl.program_id(1).to(tl.int64)  # of the output
    pixels = height * width
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    channel = tl.arange(0, BLOCK_C)[None, :]
    mask = (pixel < pixels) & (channel < CHANNELS)
    source = x + frame // TIMES * pixels * (TIMES * CHANNELS) + frame % TIMES * CHANNELS
    value = tl.load(source + pixel.to(tl.int64) * (TIMES * CHANNELS) + channel, mask)
    corner = (pixel // width).to(tl.int64) * (4 * width) + pixel % width * 2
    for row in tl.static_range(2):
        for column in tl.static_range(2):
            place = frame * 4 * pixels + corner + row * (2 * width) + column
            tl.store(out + place * CHANNELS + channel, value, mask)


def spread(x, times):
    x = x.contiguous()
    batch, frames, height, width, channels = x.shape
    out = x.new_empty(batch, times * frames, 2 * height, 2 * width, channels // times)
    tile = _tile(channels // times)
    grid = (triton.cdiv(height * width, tile["BLOCK_P"]), batch * times * frames)
    _spread[grid](x, out, height, width, times, **tile)
    return out


@triton.jit
def _to_uint8(x, out, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + place, place < size, other=0.0).to(tl.float32)
    # Rounded where the video processor rounds.
    value = (value * 0.5 + 0.5).to(x.dtype.element_ty).to(tl.float32)
    # To the nearest, of two the even one: so are sums that have no bits left for fractions.
    value = (value * 255 + 8388608.0) - 8388608.0
    tl.store(out + place, value.to(tl.int32).to(tl.uint8), place < size)


def to_uint8(x):
    x = x.contiguous()
    out = torch.empty_like(x, dtype=torch.uint8)
    # A product and a sum in one would be rounded once, torch rounds both.
    _to_uint8[(triton.cdiv(x.numel(), 1024),)](x, out, x.numel(), 1024, enable_fp_fusion=False)
    return out
