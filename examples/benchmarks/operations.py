"""How many operations a video or a gradient takes, and in what time this machine does them at best.

What counts are the linear layers and the attention of the transformer and the convolutions of the autoencoder, at the
shapes that they have. An addition and a multiplication are two operations. Each shape is measured by itself in every
way that torch has for it, the fastest counts, and the sum is a floor: the time if nothing else took any, no norm, no
copy and no launch.
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
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
from astrolabe_diffusers.models.latent_frames import num_latents_of


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
class AttentionGradient(Attention):
    """Of queries, keys and values, for which the scores are computed again."""

    @property
    def operations(self) -> int:
        return super().operations * 5 // 2

    def ways(self, randn: Callable[..., torch.Tensor]) -> list[Callable[[], Any]]:
        *inputs, gradient = (
            randn(self.batch, length, self.heads, self.head_dim).transpose(1, 2)
            for length in (self.queries, self.keys, self.keys, self.queries)
        )
        for x in inputs:
            x.requires_grad_()

        def backward(*kernels: SDPBackend) -> Callable[[], Any]:
            @functools.cache
            def attended() -> torch.Tensor:
                with torch.enable_grad(), sdpa_kernel([*kernels]) if kernels else nullcontext():
                    return F.scaled_dot_product_attention(*inputs)

            return lambda: torch.autograd.grad(attended(), inputs, gradient, retain_graph=True)

        ways = [backward(kernel) for kernel in KERNELS.values()] if gradient.is_cuda else []
        return [*ways, backward()]


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
    """How often each [`Linear`], [`Attention`], [`AttentionGradient`] and [`Convolution`] is computed."""

    def __add__(self, other: Counter) -> "Work":
        return Work(super().__add__(other))

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


def layer_pass(
    config, batch: int, blocks: Sequence[tuple[int, int]], frame_tokens: int, text_tokens: int
) -> tuple[Work, Work]:
    """The linear layers and the attention of a layer. `blocks` has of each block that passes together its latent
    frames and those that it sees, itself included.

    The text's keys and values, of which a video needs one pass, are left out.
    """
    heads, head_dim = config.num_attention_heads, config.attention_head_dim
    tokens, dim = sum(frames for frames, _ in blocks) * frame_tokens, heads * head_dim
    linears = Work({Linear(batch * tokens, dim, dim): 6})  # Q, K, V and output, and Q and output for the text
    linears[Linear(batch * tokens, dim, config.ffn_dim)] += 1
    linears[Linear(batch * tokens, config.ffn_dim, dim)] += 1
    attention = Work({Attention(batch, heads, tokens, text_tokens, head_dim): 1})
    for frames, keys in blocks:
        attention[Attention(batch, heads, frames * frame_tokens, keys * frame_tokens, head_dim)] += 1
    return linears, attention


def embedding(config, rows: int) -> Work:
    """The transformer's first layer and its last one."""
    dim, patch = config.num_attention_heads * config.attention_head_dim, prod(config.patch_size)
    work = Work({Linear(rows, config.in_channels * patch, dim): 1})
    work[Linear(rows, dim, config.out_channels * patch)] += 1
    return work


def transformer_pass(config, batch: int, frames: int, frame_tokens: int, keys: int, text_tokens: int) -> Work:
    """A pass of `frames` latent frames that see `keys` frames, themselves included.

    The text's own layers, of which a video needs one pass, and those of the time are left out.
    """
    linears, attention = layer_pass(config, batch, [(frames, keys)], frame_tokens, text_tokens)
    return (linears + attention).times(config.num_layers) + embedding(config, batch * frames * frame_tokens)


def denoising(pipe: CausalWanPipeline, batch: int, num_frames: int, height: int, width: int) -> list[Work]:
    """Of each block of a video: the pass that takes up the block before it, clean, and one of every step."""
    config, num_context = pipe.transformer.config, pipe.config.num_context_frames
    n, scale = config.num_frames_per_block, pipe.vae.config.scale_factor_spatial
    frame_tokens = (height // scale // config.patch_size[1]) * (width // scale // config.patch_size[2])

    def work(frames: int, keys: int) -> Work:
        seen = keys if config.local_attn_size == -1 else min(keys, config.local_attn_size)
        return transformer_pass(config, batch, frames, frame_tokens, seen, pipe.config.max_sequence_length)

    blocks = []
    for start in range(0, num_latents_of(pipe.vae, num_frames), n):
        levels = pipe.config.sigmas if start else pipe.config.first_block_sigmas or pipe.config.sigmas
        past = min(start, num_context) if num_context else start
        block = work(n, past + n).times(len(levels))
        if start:
            block += work(num_context, num_context) if num_context else work(n, start)
        blocks.append(block)
    return blocks


def gradient(
    pipe: CausalWanPipeline,
    batch: int,
    num_frames: int,
    height: int,
    width: int,
    rank: int,
    checkpointing: str,
    num_frozen: int,
) -> Work:
    """Of an optimizer step with clean context: the clean blocks' keys and values, the passes of the frozen policies
    and of the current one, what `checkpointing` has computed again, and the backward pass.

    Frozen policies count as merged weights, the current one's LoRA of this `rank` as on every linear layer of the
    blocks. What [`transformer_pass`] leaves out is left out, and so is the gradient of the last layer.
    """
    config, n = pipe.transformer.config, pipe.transformer.config.num_frames_per_block
    scale = pipe.vae.config.scale_factor_spatial
    frame_tokens = (height // scale // config.patch_size[1]) * (width // scale // config.patch_size[2])
    stops = range(n, num_latents_of(pipe.vae, num_frames) + 1, n)
    window = stops[-1] if config.local_attn_size == -1 else config.local_attn_size
    blocks = [(n, min(stop, window)) for stop in stops]
    sizes = frame_tokens, pipe.config.max_sequence_length
    linears, attention = layer_pass(config, batch, blocks, *sizes)
    ends = embedding(config, batch * stops[-1] * frame_tokens)
    work = ((linears + attention).times(config.num_layers) + ends).times(1 + num_frozen)
    if clean := blocks[:-1]:
        # Of the last layer nothing but keys and values is wanted.
        clean_linears, clean_attention = layer_pass(config, batch, clean, *sizes)
        work += (clean_linears + clean_attention).times(config.num_layers - 1)
        rows, dim = batch * len(clean) * n * frame_tokens, config.num_attention_heads * config.attention_head_dim
        work[Linear(rows, dim, dim)] += 2
        work[Linear(rows, config.in_channels * prod(config.patch_size), dim)] += 1
    forward, backward = Work(), Work()
    for linear, count in linears.items():
        down, up = Linear(linear.rows, linear.inputs, rank), Linear(linear.rows, rank, linear.outputs)
        forward += Work({down: count}) + Work({up: count})
        # Of what goes in, and of the LoRA's weights.
        for layer in (linear, down, up):
            backward[Linear(layer.rows, layer.outputs, layer.inputs)] += count
        for layer in (down, up):
            backward[Linear(layer.inputs, layer.rows, layer.outputs)] += count
    for kernel, count in attention.items():
        backward[AttentionGradient(**vars(kernel))] += count
    work += (forward + backward).times(config.num_layers)
    again = {"none": Work(), "selective": linears + forward, "full": linears + attention + forward}[checkpointing]
    return work + again.times(config.num_layers)


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
