"""Dense attention on the kernel that is fastest, and attention to keys that lie in several places."""

from functools import lru_cache
from math import ceil

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from .checked_kernels import with_kernel
from .kv_cache import KeyValue


# Kernels of torch's attention, the fastest first; one that cannot take an input is passed over. Torch itself would try
# flash first, which takes 1.75 times as long as cuDNN on an H100 at these shapes.
_KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# A thread block of cuDNN's kernel has as many queries of one head. On an H100 it takes these microseconds a key, and
# once; merging takes as much a value, read or written.
_TILE, _PER_KEY, _ONCE, _MERGING = 128, 0.0144, 7.0, 2 / 2.5e6
# Parts of the keys that are tried, and the share of the time that they have to save.
_PARTS, _WORTHWHILE = (1, 2, 3, 4, 5, 6), 0.05


def _is_chosen(backend: str | None) -> bool:
    """Whether the user has chosen a backend: for these layers, for a while, or for the process."""
    return backend is not None or _AttentionBackendRegistry.get_active_backend()[0] != AttentionBackendName.NATIVE


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Dense attention, `(B, L, heads, head_dim)` each, with the backend that `set_attention_backend` chose, if any."""
    is_plain = attention_mask is None and not torch.is_grad_enabled() and not _is_chosen(backend)
    if is_plain and query.device.type == "cuda":
        return torch.ops.astrolabe_diffusers.attend.default(query, key, value)
    with sdpa_kernel(_KERNELS, set_priority=True):
        return dispatch_attention_fn(query, key, value, attn_mask=attention_mask, backend=backend)


# An operator, which to torch.compile is one thing: into how many parts the keys go, which become more with every
# block, is nothing to compile anew. Its calls cost a quarter of what choosing a kernel for each of them does.
torch.library.define("astrolabe_diffusers::attend", "(Tensor query, Tensor key, Tensor value) -> Tensor")


@torch.library.register_fake("astrolabe_diffusers::attend")
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@torch.library.impl("astrolabe_diffusers::attend", "CUDA")
def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    transposed = [x.transpose(1, 2) for x in (query, key, value)]
    if not can_use_cudnn_attention(SDPAParams(*transposed, None, 0.0, False, False)):
        with sdpa_kernel(_KERNELS, set_priority=True):
            attended = F.scaled_dot_product_attention(*transposed).transpose(1, 2)
        return attended.type_as(query).contiguous()  # autocast may have made it another dtype's
    parts = 1
    if len(query) == 1:
        sizes = query.shape[1], key.shape[1], query.shape[2], query.shape[3]
        parts = num_parts(*sizes, _num_processors(query.device))
    if parts > 1:
        return attend_in_parts(query, key, value, parts)
    return torch.ops.aten._scaled_dot_product_cudnn_attention(*transposed, None, False)[0].transpose(1, 2).contiguous()


@lru_cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def num_parts(num_queries: int, num_keys: int, num_heads: int, head_dim: int, num_processors: int) -> int:
    """Into how many equal parts the keys should go.

    Thread blocks run in waves of as many as the GPU has processors. 4,680 queries of 12 heads are 444 tiles, which
    take 132 processors four waves, the last a third full; with the keys in two parts there are 888, and seven waves
    of half the length.
    """
    tiles = ceil(num_queries / _TILE) * num_heads

    def cost(parts: int) -> float:
        waves = ceil(tiles * parts / num_processors)
        merging = 0 if parts == 1 else (parts + 1) * num_queries * num_heads * head_dim * _MERGING
        return waves * (num_keys / parts * _PER_KEY * head_dim / 128 + _ONCE) + merging

    best = min((parts for parts in _PARTS if num_keys % parts == 0), key=cost)
    return best if cost(best) < (1 - _WORTHWHILE) * cost(1) else 1


def attend_in_parts(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, parts: int) -> torch.Tensor:
    """Attention of one video, `(1, L, heads, head_dim)` each: to equal parts of the keys in one call, as if they were
    videos, and then merged. Without gradients."""
    key, value = (x.unflatten(1, (parts, -1)).flatten(0, 1) for x in (key, value))
    return merge(*_attend_with_logsumexp(query.expand(parts, -1, -1, -1), key, value)).unsqueeze(0)


@with_kernel("attention_kernels")
def merge(outputs: torch.Tensor, logsumexp: torch.Tensor) -> torch.Tensor:
    """Attention to all keys, `(L, heads, head_dim)`, of attention to parts of them, `(parts, L, heads, head_dim)`, and
    the logarithms of its denominators, `(parts, L, heads)` float32."""
    weights = logsumexp.softmax(dim=0).unsqueeze(-1)
    return (outputs.float() * weights).sum(0).type_as(outputs)


def _attend_with_logsumexp(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and the logarithm of its denominators, `(B, L, heads, head_dim)` and `(B, L, heads)` float32."""
    aten = torch.ops.aten
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if query.device.type == "cpu":
        output, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    elif can_use_cudnn_attention(SDPAParams(query, key, value, None, 0.0, False, False)):
        output, logsumexp, *_ = aten._scaled_dot_product_cudnn_attention(query, key, value, None, True)
    else:
        output, logsumexp, *_ = aten._scaled_dot_product_efficient_attention(query, key, value, None, True)
    # Some kernels pad the queries, or keep a last dimension of one.
    logsumexp = logsumexp.reshape(*logsumexp.shape[:2], -1)[..., : query.shape[2]]
    return output.transpose(1, 2), logsumexp.transpose(1, 2).float()


# An operator as well: torch.compile cannot ask which kernels there are.
torch.library.define(
    "astrolabe_diffusers::attend_with_logsumexp", "(Tensor query, Tensor key, Tensor value) -> (Tensor, Tensor)"
)


@torch.library.register_fake("astrolabe_diffusers::attend_with_logsumexp")
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    batch_size, length, heads, _ = query.shape
    return output, query.new_empty(batch_size, heads, length, dtype=torch.float32).transpose(1, 2)


@torch.library.impl("astrolabe_diffusers::attend_with_logsumexp", "CompositeExplicitAutograd")
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    output, logsumexp = _attend_with_logsumexp(query, key, value)
    # Copies where a kernel has another layout than cuDNN.
    return output.contiguous(), logsumexp.transpose(1, 2).contiguous().transpose(1, 2)


def attend_with_shared_past(
    query: torch.Tensor, past: KeyValue, own: KeyValue, backend: str | None = None
) -> torch.Tensor:
    """Attention of `B` videos to keys and values `(1, S, heads, head_dim)` of a past that they share, and to their own
    `(B, L, heads, head_dim)`.

    The queries of all videos attend to the past in one call, as one long sequence, and each video's to its own keys in
    another; weighted by the denominators the two are the attention to all keys. Where a kernel does not give these,
    with a backend of the user's and with gradients, the past is repeated for every video instead.
    """
    if _is_chosen(backend) or torch.is_grad_enabled():
        key, value = (torch.cat([p.expand(len(query), -1, -1, -1), o], dim=1) for p, o in zip(past, own))
        return attend(query, key, value, backend=backend)
    attend_with_logsumexp = torch.ops.astrolabe_diffusers.attend_with_logsumexp.default
    to_past, past_logsumexp = attend_with_logsumexp(query.flatten(0, 1).unsqueeze(0), *past)
    to_own, own_logsumexp = attend_with_logsumexp(query, *own)
    weight = torch.sigmoid(past_logsumexp.view_as(own_logsumexp) - own_logsumexp).unsqueeze(-1)
    return torch.lerp(to_own.float(), to_past.reshape(to_own.shape).float(), weight).type_as(query)
