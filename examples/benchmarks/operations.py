"""How many operations a video takes, and in what time this machine does them at best.

What counts are the linear layers and the attention of the transformer and the convolutions of the autoencoder, at the
shapes that they have. An addition and a multiplication are two operations. Each shape is measured by itself in every
way that torch has for it, the fastest counts, and the sum is a floor: the time of a video of which nothing else took
any, no norm, no copy and no launch.
"""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan
from measuring import clock
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from astrolabe_diffusers import CausalWanPipeline


SECONDS_A_KERNEL = 0.05  # for which each is repeated
KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True)
class Linear:
    rows: int
    inputs: int
    outputs: int

    @property
    def operations(self) -> int:
        return 2 * self.rows * self.inputs * self.outputs

    def ways(self, randn: Callable[..., torch.Tensor]) -> list[Callable[[], Any]]:
        x, weight, bias = randn(self.rows, self.inputs), randn(self.outputs, self.inputs), randn(self.outputs)
        return [lambda: F.linear(x, weight, bias)]


@dataclass(frozen=True)
class Attention:
    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int

    @property
    def operations(self) -> int:
        return 4 * self.batch * self.heads * self.queries * self.keys * self.head_dim

    def ways(self, randn: Callable[..., torch.Tensor]) -> list[Callable[[], Any]]:
        query, key, value = (
            randn(self.batch, length, self.heads, self.head_dim).transpose(1, 2)
            for length in (self.queries, self.keys, self.keys)
        )

        def attend(*kernels: SDPBackend):
            with sdpa_kernel([*kernels]):
                F.scaled_dot_product_attention(query, key, value)

        ways = [functools.partial(attend, kernel) for kernel in KERNELS.values()] if query.is_cuda else []
        return [*ways, lambda: F.scaled_dot_product_attention(query, key, value)]


@dataclass(frozen=True)
class Convolution:
    """Of images or videos, without strides; `padding` as torch has it."""

    inputs: tuple[int, ...]
    weight: tuple[int, ...]
    padding: tuple[int, ...]

    @property
    def operations(self) -> int:
        outputs = (n + 2 * pad - k + 1 for n, pad, k in zip(self.inputs[2:], self.padding, self.weight[2:]))
        return 2 * prod(self.weight) * self.inputs[0] * prod(outputs)

    def ways(self, randn: Callable[..., torch.Tensor]) -> list[Callable[[], Any]]:
        """As they are, with the channels last, and in space alone over frames that are stacked in the channels; what
        it takes to stack them is not measured."""
        x, weight, bias = randn(*self.inputs), randn(*self.weight), randn(self.weight[0])
        convolve, last = F.conv2d, torch.channels_last
        stacked = []
        if x.ndim == 5:
            convolve, last = F.conv3d, torch.channels_last_3d
            size = self.weight[2]
            num_frames = self.inputs[2] + 2 * self.padding[0] - size + 1
            frames = randn(self.inputs[0] * num_frames, size * self.inputs[1], *self.inputs[3:])
            flat = weight.transpose(1, 2).flatten(1, 2)
            frames, flat = (t.contiguous(memory_format=torch.channels_last) for t in (frames, flat))
            stacked = [lambda: F.conv2d(frames, flat, bias, padding=self.padding[1:])]
        x_last, weight_last = (t.contiguous(memory_format=last) for t in (x, weight))
        return [
            lambda: convolve(x, weight, bias, padding=self.padding),
            lambda: convolve(x_last, weight_last, bias, padding=self.padding),
            *stacked,
        ]


class Work(Counter):
    """How often each [`Linear`], [`Attention`] and [`Convolution`] is computed."""

    def times(self, count: int) -> "Work":
        return Work({kernel: count * number for kernel, number in self.items()})

    @property
    def operations(self) -> int:
        return sum(number * kernel.operations for kernel, number in self.items())

    def floor(self, device: torch.device, dtype: torch.dtype) -> float:
        """Seconds."""
        return sum(number * fastest(kernel, device, dtype) for kernel, number in self.items())


@functools.cache
def fastest(kernel: Linear | Attention | Convolution, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of the fastest way that runs here."""
    seconds = []
    for way in kernel.ways(functools.partial(torch.randn, device=device, dtype=dtype)):
        try:
            seconds.append(_seconds(way))
        except RuntimeError:  # a kernel that cannot take this shape, dtype or device
            continue
    return min(seconds)


def attention_kernels(head_dim: int, device: torch.device, dtype: torch.dtype) -> dict[str, SDPBackend | None]:
    """Of `KERNELS`, those that this device has for such heads; otherwise torch's choice."""
    x, found = torch.zeros(1, 1, 64, head_dim, device=device, dtype=dtype), {}
    for name, kernel in KERNELS.items() if device.type == "cuda" else ():
        try:
            with sdpa_kernel(kernel):
                F.scaled_dot_product_attention(x, x, x)
        except RuntimeError:
            continue
        found[name] = kernel
    return found or {"torch": None}


def _seconds(way: Callable[[], Any]) -> float:
    with torch.no_grad():
        way()  # chooses its kernel
        start = clock()
        way()
        number = max(1, round(SECONDS_A_KERNEL / max(clock() - start, 1e-6)))
        start = clock()
        for _ in range(number):
            way()
        return (clock() - start) / number


def peak_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of one large product of matrices: what this machine reaches, not what its maker states."""
    size = 8192 if device.type == "cuda" else 1024
    matmul = Linear(size, size, size)
    return matmul.operations / fastest(matmul, device, dtype)


def transformer_pass(config, batch: int, frames: int, frame_tokens: int, keys: int, text_tokens: int) -> Work:
    """A pass of `frames` latent frames that see `keys` frames, themselves included.

    The text's own layers, of which a video needs one pass, and those of the time are left out.
    """
    rows, heads, head_dim = batch * frames * frame_tokens, config.num_attention_heads, config.attention_head_dim
    dim, patch = heads * head_dim, prod(config.patch_size)
    work = Work({Linear(rows, dim, dim): 6})  # Q, K, V and output, and Q and output for the text
    work[Linear(rows, dim, config.ffn_dim)] += 1
    work[Linear(rows, config.ffn_dim, dim)] += 1
    work[Attention(batch, heads, frames * frame_tokens, keys * frame_tokens, head_dim)] += 1
    work[Attention(batch, heads, frames * frame_tokens, text_tokens, head_dim)] += 1
    work = work.times(config.num_layers)
    work[Linear(rows, config.in_channels * patch, dim)] += 1
    work[Linear(rows, dim, config.out_channels * patch)] += 1
    return work


def denoising(pipe: CausalWanPipeline, batch: int, num_frames: int, height: int, width: int) -> list[Work]:
    """Of each block of a video: the pass that takes up the block before it, clean, and one of every step."""
    config, num_context = pipe.transformer.config, pipe.config.num_context_frames
    n, scale = config.num_frames_per_block, pipe.vae.config.scale_factor_spatial
    frame_tokens = (height // scale // config.patch_size[1]) * (width // scale // config.patch_size[2])

    def work(frames: int, keys: int) -> Work:
        seen = keys if config.local_attn_size == -1 else min(keys, config.local_attn_size)
        return transformer_pass(config, batch, frames, frame_tokens, seen, pipe.config.max_sequence_length)

    blocks = []
    for start in range(0, (num_frames - 1) // pipe.vae.config.scale_factor_temporal + 1, n):
        levels = pipe.config.sigmas if start else pipe.config.first_block_sigmas or pipe.config.sigmas
        past = min(start, num_context) if num_context else start
        block = work(n, past + n).times(len(levels))
        if start:
            block += work(num_context, num_context) if num_context else work(n, start)
        blocks.append(block)
    return blocks


class _Recorder(TorchDispatchMode):
    """Counts the convolutions and the attention of what is computed under it."""

    def __init__(self):
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            x, weight, _, _, padding = args[:5]
            self.work[Convolution(tuple(x.shape), tuple(weight.shape), tuple(padding))] += 1
        return func(*args, **kwargs or {})


def decoding(vae: AutoencoderKLWan, batch: int, num_latents: int, height: int, width: int) -> list[Work]:
    """Of each latent frame of a video of this size in pixels. Nothing is computed: only the shapes are looked at.

    The attention in the middle of the decoder is left out, which is 1 % of it.
    """
    with init_empty_weights():
        shapes = AutoencoderKLWan.from_config(vae.config).to("meta").eval()
    scale = vae.config.scale_factor_spatial
    latents = torch.empty(batch, vae.config.z_dim, 1, height // scale, width // scale, device="meta")
    features, work = [None] * shapes._cached_conv_counts["decoder"], []
    for i in range(min(num_latents, 3)):  # from the third on they are alike
        with torch.no_grad(), _Recorder() as recorder:
            hidden_states = shapes.post_quant_conv(latents)
            shapes.decoder(hidden_states, feat_cache=features, feat_idx=[0], first_chunk=i == 0)
        work.append(recorder.work)
    return work + work[-1:] * (num_latents - len(work))
