"""Triton kernel of the pass in `attention` that has one, where it is described."""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["size"])
def _merge(
    outputs, logsumexp, out, size, num_heads, part, row, head, log_part, log_row, log_head,
    PARTS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # A program has some queries of some heads. `part` to `log_head` are strides.
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel, inside = tl.arange(0, BLOCK_D)[None, :], index < size
    mask = inside[:, None] & (channel < DIM)
    logs = logsumexp + index // num_heads * log_row + index % num_heads * log_head
    values = outputs + (index // num_heads * row + index % num_heads * head)[:, None] + channel
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    for i in tl.static_range(PARTS):
        peak = tl.maximum(peak, tl.load(logs + i * log_part, inside, other=0.0))
    total = tl.zeros([BLOCK], tl.float32)
    result = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for i in tl.static_range(PARTS):
        weight = tl.exp(tl.load(logs + i * log_part, inside, other=0.0) - peak)
        total += weight
        result += weight[:, None] * tl.load(values + i * part, mask, other=0.0).to(tl.float32)
    result = result / total[:, None]
    tl.store(out + index[:, None] * DIM + channel, result.to(out.dtype.element_ty), mask)


def merge(outputs, logsumexp):
    parts, rows, heads, dim = outputs.shape
    if outputs.stride(-1) != 1:
        outputs = outputs.contiguous()
    out = torch.empty(rows, heads, dim, device=outputs.device, dtype=outputs.dtype)
    strides = *outputs.stride()[:3], *logsumexp.stride()
    block = 32
    constants = {"PARTS": parts, "DIM": dim, "BLOCK_D": triton.next_power_of_2(dim), "BLOCK": block}
    _merge[(triton.cdiv(rows * heads, block),)](outputs, logsumexp, out, rows * heads, heads, *strides, **constants)
    return out
