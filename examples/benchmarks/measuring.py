"""Time and memory on this machine, of a pipeline's calls among others."""

import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch

from astrolabe_diffusers import CausalWanPipeline
from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.reporting.machine import peak_memory_gb


def clock() -> float:
    """Now, in seconds, when the device has finished what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def forget_peak():
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def gpu_peak() -> float:
    """GB (1e9 bytes) since [`forget_peak`]."""
    return peak_memory_gb(torch.device("cuda")) if torch.cuda.is_available() else 0.0


@contextmanager
def limited_memory(device: torch.device, gigabytes: float | None, argv: list[str] | None) -> Iterator[None]:
    """Inside, torch can allocate so many GB (1e9 bytes) of the device, as on a smaller card, or all of them.

    Raises:
        UserError: what runs inside needs more, with the command line `argv`; or there is no such device.
    """
    limit = "memory"
    if gigabytes is not None:
        limit = f"{gigabytes:g} GB"
        if device.type != "cuda":
            raise UserError(f"--memory_gb needs a CUDA device: {device} has no limit.")
        total = torch.cuda.get_device_properties(device).total_memory
        if not 0 < gigabytes * 1e9 <= total:
            raise UserError(f"--memory_gb {gigabytes:g}: it can be more than 0, up to the card's {total / 1e9:.1f}.")
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / total, index)
    try:
        yield
    except torch.OutOfMemoryError as error:
        asked = shlex.join(sys.argv[1:] if argv is None else argv)
        raise UserError(f"out of {limit}: {asked}") from error
    finally:
        if gigabytes is not None:
            torch.cuda.set_per_process_memory_fraction(1.0, index)


@dataclass
class Measurement:
    """Seconds, medians over repetitions; a block is one after the context is full. Memory is the peak in GB (1e9)."""

    first_frames: float  # from the call to the first frames, text included
    first_block: float
    block: float
    denoise: float  # the whole video
    decode_block: float
    decode: float  # the whole video
    frames_per_second: float  # of a video that is decoded as it is made, at its end
    gpu_memory: float  # of a call with text and decoding
    host_memory: float


@dataclass
class StreamMeasurement:
    """Streams that take turns. Seconds are medians, GB are 1e9 bytes; the end is the last quarter of the blocks."""

    first_frames: float  # from the call of the first stream to its first frames, text included
    block: float  # of one stream, at the end
    frames_per_second: float  # of all streams together, at the end
    gpu_memory_half: float  # allocated when half of the blocks are done
    gpu_memory_end: float
    gpu_memory_peak: float


def timed(steps: Iterable) -> list[float]:
    """Seconds of each step of an iterator."""
    times, before = [], clock()
    for _ in steps:
        after = clock()
        times.append(after - before)
        before = after
    return times


def at_the_end(times: list[float]) -> float:
    """The median of the last quarter."""
    return median(times[-len(times) // 4 :])


def measure(pipe: CausalWanPipeline, repetitions: int = 3, **kwargs) -> Measurement:
    """A pipeline on its device, offloading and compilation as wanted; `kwargs` are those of its method `stream`."""
    kwargs.setdefault("num_frames", pipe.default_num_frames(kwargs["prompt"]))

    def decode() -> list[float]:
        decoder = pipe.new_decoder()
        with torch.no_grad():
            return timed(decoder.decode(block) for block in latents)

    # The first calls compile kernels; they also give the embeddings and latents that the parts are timed with.
    prompt_embeds = pipe.encode_prompt(kwargs["prompt"])
    pipe.maybe_free_model_hooks()
    parts = {**kwargs, "prompt": None, "prompt_embeds": prompt_embeds, "output_type": "latent"}
    latents = list(pipe.stream(**parts))
    decode()
    forget_peak()
    whole = [timed(pipe.stream(**{**kwargs, "output_type": "pt"})) for _ in range(repetitions)]
    gpu_memory = gpu_peak()
    # Every block but the first has as many.
    scale = pipe.vae.config.scale_factor_temporal
    num_frames = latents[-1].shape[0] * latents[-1].shape[2] * scale

    denoising = [timed(pipe.stream(**parts)) for _ in range(repetitions)]
    decoding = [decode() for _ in range(repetitions)]
    return Measurement(
        first_frames=median(times[0] for times in whole),
        first_block=median(times[0] for times in denoising),
        block=median(times[-1] for times in denoising),
        denoise=median(sum(times) for times in denoising),
        decode_block=median(times[-1] for times in decoding),
        decode=median(sum(times) for times in decoding),
        frames_per_second=num_frames / median(at_the_end(times) for times in whole),
        gpu_memory=gpu_memory,
        host_memory=peak_memory_gb(torch.device("cpu")),
    )


def measure_streams(pipe: CausalWanPipeline, num_streams: int = 1, **kwargs) -> StreamMeasurement:
    """Several streams on one pipeline, which take turns block by block; arguments as in [`measure`]."""
    kwargs["output_type"] = "pt"
    with pipe.stream(**kwargs) as stream:  # compiles kernels
        next(stream), next(stream)
    forget_peak()
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
        memory.append(torch.cuda.memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0)
        before = after
    turn = at_the_end(times)
    return StreamMeasurement(
        first_frames=first_frames,
        block=turn / num_streams,
        frames_per_second=num_frames / turn,
        gpu_memory_half=memory[len(memory) // 2],
        gpu_memory_end=memory[-1],
        gpu_memory_peak=gpu_peak(),
    )
