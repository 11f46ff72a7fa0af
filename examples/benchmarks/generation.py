"""Measures speed and memory of a pipeline on this machine: a published model at full size with random weights, or any.

python examples/benchmarks/generation.py --recipe self-forcing
python examples/benchmarks/generation.py --model FOLDER_OR_HUB_ID --num_streams 2
"""

import argparse
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import median

import torch
from measuring import clock, forget_peak, gpu_peak
from random_models import random_pipeline, recipe_of

from astrolabe_diffusers import CausalWanPipeline
from astrolabe_diffusers.cli.arguments import ArgumentParser
from astrolabe_diffusers.errors import CHECKED, as_user_error, exit_code
from astrolabe_diffusers.generation.config import OFFLOADS
from astrolabe_diffusers.layouts.published_models import PUBLISHED_MODELS
from astrolabe_diffusers.models.vae_streaming import StreamingVAEDecoder
from astrolabe_diffusers.pipelines.loading import load_from, prepare_pipeline
from astrolabe_diffusers.reporting.machine import peak_memory_gb


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


def measure(pipe: CausalWanPipeline, repetitions: int = 3, **kwargs) -> Measurement:
    """A pipeline on its device, offloading and compilation as wanted; `kwargs` are those of its method `stream`."""
    kwargs.setdefault("num_frames", pipe.default_num_frames(kwargs["prompt"]))

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
    forget_peak()
    whole = [timed(pipe.stream(**{**kwargs, "output_type": "pt"})) for _ in range(repetitions)]
    gpu_memory = gpu_peak()

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
    turn = median(times[-len(times) // 4 :])
    return StreamMeasurement(
        first_frames=first_frames,
        block=turn / num_streams,
        frames_per_second=num_frames / turn,
        gpu_memory_half=memory[len(memory) // 2],
        gpu_memory_end=memory[-1],
        gpu_memory_peak=gpu_peak(),
    )


def main(argv: list[str] | None = None) -> Measurement | StreamMeasurement:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--recipe", choices=PUBLISHED_MODELS, help="a published model, random weights at full size")
    source.add_argument("--model", "--pipeline", help="folder or Hub id of a pipeline")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--num_frames", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--offload", choices=OFFLOADS, default="none", help="what leaves the GPU while it is not used")
    parser.add_argument("--vae_tiling", action="store_true")
    parser.add_argument("--attention_backend", help="of diffusers; by default the fastest exact kernel of torch")
    parser.add_argument("--prompt", default="a boat on a lake", help="may have scenes")
    parser.add_argument("--num_streams", type=int, help="measure streams that take turns, not the parts")
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args(argv)
    dtype = getattr(torch, args.dtype)
    recipe = recipe_of(args.recipe, args.model)
    pipe = random_pipeline(recipe, args.device, dtype) if recipe else load_from(args.model, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    prepare_pipeline(pipe, torch.device(args.device), args.offload, args.vae_tiling, args.attention_backend)
    sizes = {name: getattr(args, name) for name in ("num_frames", "height", "width") if getattr(args, name)}
    arguments = {"prompt": args.prompt, "num_videos_per_prompt": args.batch_size, **sizes}
    with as_user_error("cannot measure that", (*CHECKED, FloatingPointError)):
        if args.num_streams:
            result = measure_streams(pipe, args.num_streams, **arguments)
        else:
            result = measure(pipe, args.repetitions, **arguments)
    print("  ".join(f"{name} {value:.3f}" for name, value in asdict(result).items()))
    return result


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
