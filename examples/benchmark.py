"""Measures speed and memory of a pipeline on this machine, with random weights at full size or a folder's."""

import argparse
import sys

import torch
from transformers import AutoTokenizer

from astrolabe_diffusers import TINY_SHAPES
from astrolabe_diffusers.benchmark import Measurement, StreamMeasurement, measure, measure_streams, random_pipeline
from astrolabe_diffusers.cli.arguments import ArgumentParser
from astrolabe_diffusers.errors import CHECKED, as_user_error
from astrolabe_diffusers.generation.config import OFFLOADS
from astrolabe_diffusers.generation.loading import load_pipeline, place_pipeline
from astrolabe_diffusers.layouts.published_models import PUBLISHED_MODELS
from astrolabe_diffusers.training import exit_code


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", choices=PUBLISHED_MODELS, help="a published model, random weights at full size")
    source.add_argument("--pipeline", help="folder or Hub id of a pipeline")
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
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> Measurement | StreamMeasurement:
    args = parse_args(argv)
    dtype = getattr(torch, args.dtype)
    if args.model:
        pipe = random_pipeline(
            args.model, AutoTokenizer.from_pretrained(TINY_SHAPES, subfolder="tokenizer"), args.device, dtype
        )
    else:
        pipe = load_pipeline(args.pipeline, dtype)
    place_pipeline(pipe, args.device, args.offload, args.vae_tiling, args.attention_backend)
    sizes = {name: getattr(args, name) for name in ("num_frames", "height", "width") if getattr(args, name)}
    arguments = {"prompt": args.prompt, "num_videos_per_prompt": args.batch_size, **sizes}
    with as_user_error("cannot measure that", (*CHECKED, FloatingPointError)):
        if args.num_streams:
            result = measure_streams(pipe, args.num_streams, **arguments)
        else:
            result = measure(pipe, args.repetitions, **arguments)
    print(result)
    return result


if __name__ == "__main__":
    sys.exit(exit_code(main))
