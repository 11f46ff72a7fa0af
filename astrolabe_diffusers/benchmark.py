"""Speed and memory of a pipeline on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from statistics import median

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from diffusers import AutoencoderKLWan, FlowMatchLCMScheduler, ModelMixin
from transformers import PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

from .layouts.published_models import PUBLISHED_MODELS
from .models.transformer_causal_wan import CausalWanTransformer3DModel
from .models.vae_streaming import StreamingVAEDecoder
from .pipelines.pipeline_causal_wan import CausalWanPipeline
from .reporting.machine import peak_host_memory_gb


# Wan2.1's two sizes, and google/umt5-xxl.
WAN_SIZES = {
    "1.3B": dict(num_attention_heads=12, num_layers=30, ffn_dim=8960),
    "14B": dict(num_attention_heads=40, num_layers=40, ffn_dim=13824),
}
UMT5_XXL = dict(
    vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
)


def random_pipeline(
    model: str, tokenizer: PreTrainedTokenizerBase, device: str, dtype: torch.dtype = torch.bfloat16
) -> CausalWanPipeline:
    """
    A published model at full size with random weights: it has the speed and the memory of the real one.

    Args:
        model: a key of `PUBLISHED_MODELS`.
        tokenizer: any; only the number of tokens, which is padded, costs time.
        device: where the weights are made.
    """
    torch.manual_seed(0)  # the same on every process
    published = PUBLISHED_MODELS[model]
    with init_empty_weights():
        transformer = CausalWanTransformer3DModel(**WAN_SIZES[published.size], **published.transformer)
        text_encoder = UMT5EncoderModel(UMT5Config(**UMT5_XXL))
    return CausalWanPipeline(
        tokenizer=tokenizer,
        text_encoder=random_weights(text_encoder, device, dtype),
        vae=AutoencoderKLWan().to(device, dtype).eval(),
        scheduler=FlowMatchLCMScheduler(shift=5.0),
        transformer=random_weights(transformer, device, dtype),
        **published.pipeline,
    )


def random_weights(model: torch.nn.Module, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """Give a model on the meta device small random weights; what diffusers keeps in float32 is in float32."""
    keep = set(model._keep_in_fp32_modules) if isinstance(model, ModelMixin) else set()
    for name, parameter in list(model.named_parameters()):
        target = dtype if keep.isdisjoint(name.split(".")) else torch.float32
        value = torch.empty(parameter.shape, device=device, dtype=target)
        value = value.fill_(1.0) if "norm" in name and value.ndim == 1 else value.normal_(0.0, 0.02)
        set_module_tensor_to_device(model, name, device, value, dtype=target)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.to(device).eval()


@dataclass
class Measurement:
    """Seconds, medians over repetitions; a block is one after the context is full. Memory is the peak in GB (1e9)."""

    first_frames: float  # from the call to the first frames, text included
    first_block: float
    block: float
    denoise: float  # the whole video
    decode_block: float
    decode: float  # the whole video
    gpu_memory: float  # of a call with text and decoding
    host_memory: float

    def __str__(self) -> str:
        return as_line(self)


@dataclass
class StreamMeasurement:
    """Streams that take turns. Seconds are medians, GB are 1e9 bytes; the end is the last quarter of the blocks."""

    first_frames: float  # from the call of the first stream to its first frames, text included
    block: float  # of one stream, at the end
    frames_per_second: float  # of all streams together, at the end
    gpu_memory_half: float  # allocated when half of the blocks are done
    gpu_memory_end: float
    gpu_memory_peak: float

    def __str__(self) -> str:
        return as_line(self)


def as_line(measurement) -> str:
    return "  ".join(f"{field.name} {getattr(measurement, field.name):.3f}" for field in fields(measurement))


def clock() -> float:
    """Now, in seconds, when the device has finished what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(pipe: CausalWanPipeline, repetitions: int = 3, **kwargs) -> Measurement:
    """
    Args:
        pipe: on its device, offloading and compilation as wanted.
        kwargs: of `CausalWanPipeline.stream`.
    """
    cuda = torch.cuda.is_available()
    kwargs = {"prompt": "a boat on a lake"} | kwargs
    kwargs.setdefault("num_frames", pipe.default_num_frames(kwargs["prompt"]))
    pipe.set_progress_bar_config(disable=True)

    def timed(steps) -> list[float]:
        """Seconds of each step of an iterator."""
        times, before = [], clock()
        for _ in steps:
            after = clock()
            times.append(after - before)
            before = after
        return times

    def decode() -> list[float]:
        decoder = StreamingVAEDecoder(pipe.vae)
        with torch.no_grad():
            return timed(decoder.decode(block) for block in latents)

    # The first calls compile kernels; they also give the embeddings and latents that the parts are timed with.
    prompt_embeds = pipe.encode_prompt(kwargs["prompt"])
    pipe.maybe_free_model_hooks()
    parts = {**kwargs, "prompt": None, "prompt_embeds": prompt_embeds, "output_type": "latent"}
    latents = list(pipe.stream(**parts))
    decode()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    whole = [timed(pipe.stream(**{**kwargs, "output_type": "pt"})) for _ in range(repetitions)]
    gpu_memory = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0

    denoising = [timed(pipe.stream(**parts)) for _ in range(repetitions)]
    decoding = [decode() for _ in range(repetitions)]
    return Measurement(
        first_frames=median(times[0] for times in whole),
        first_block=median(times[0] for times in denoising),
        block=median(times[-1] for times in denoising),
        denoise=median(sum(times) for times in denoising),
        decode_block=median(times[-1] for times in decoding),
        decode=median(sum(times) for times in decoding),
        gpu_memory=gpu_memory,
        host_memory=peak_host_memory_gb(),
    )


def measure_streams(pipe: CausalWanPipeline, num_streams: int = 1, **kwargs) -> StreamMeasurement:
    """
    Several streams on one pipeline, which take turns block by block.

    Args:
        pipe: on its device, offloading and compilation as wanted.
        kwargs: of `CausalWanPipeline.stream`.
    """
    cuda = torch.cuda.is_available()
    kwargs = {"prompt": "a boat on a lake", "output_type": "pt"} | kwargs
    pipe.set_progress_bar_config(disable=True)

    def allocated() -> float:
        return torch.cuda.memory_allocated() / 1e9 if cuda else 0.0

    with pipe.stream(**kwargs) as stream:  # compiles kernels
        next(stream), next(stream)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = clock()
    streams = [pipe.stream(**kwargs)]
    next(streams[0])
    first_frames = clock() - started
    streams += [pipe.stream(**kwargs) for _ in range(num_streams - 1)]
    for stream in streams[1:]:
        next(stream)
    times, memory, before = [], [], clock()
    for pieces in zip(*streams):
        num_frames = sum(piece.shape[0] * piece.shape[1] for piece in pieces)
        after = clock()
        times.append(after - before)
        memory.append(allocated())
        before = after
    turn = median(times[-len(times) // 4 :])
    return StreamMeasurement(
        first_frames=first_frames,
        block=turn / num_streams,
        frames_per_second=num_frames / turn,
        gpu_memory_half=memory[len(memory) // 2],
        gpu_memory_end=memory[-1],
        gpu_memory_peak=torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0,
    )
