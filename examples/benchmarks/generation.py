"""Measures speed and memory of a pipeline on this machine: a published model at full size with random weights, or any.

python examples/benchmarks/generation.py --recipe self-forcing
python examples/benchmarks/generation.py --recipe self-forcing --baseline
python examples/benchmarks/generation.py --recipe self-forcing --compile --quantization float8
python examples/benchmarks/generation.py --recipe self-forcing --offload group --memory_gb 16
python examples/benchmarks/generation.py --model FOLDER_OR_HUB_ID --num_streams 2
"""

import argparse
from dataclasses import asdict, replace

import torch
from comparison import Clip, compare
from measuring import Measurement, StreamMeasurement, limited_memory, measure, measure_streams
from random_models import add_tiny_decoder, random_pipeline, recipe_of

from astrolabe_diffusers.cli.arguments import ArgumentParser
from astrolabe_diffusers.errors import CHECKED, UserError, as_user_error, exit_code
from astrolabe_diffusers.layouts.published_models import PUBLISHED_MODELS
from astrolabe_diffusers.pipelines.config import OFFLOADS
from astrolabe_diffusers.pipelines.loading import load_from, prepare_pipeline, video_size
from astrolabe_diffusers.pipelines.quantization import QUANTIZATIONS, quantization_config


def main(argv: list[str] | None = None) -> Measurement | StreamMeasurement | dict[str, Measurement]:
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
    parser.add_argument("--memory_gb", type=float, help="as on a card that has so many GB (1e9 bytes) for torch")
    parser.add_argument("--tiny_decoder", help="decode with it: its file or folder, or `random` weights")
    parser.add_argument("--attention_backend", help="of diffusers; by default the fastest exact kernel of torch")
    parser.add_argument("--compile", action="store_true", help="the transformer's blocks, before they are timed")
    parser.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help="8-bit linear layers; prints the error of a flow and of a block's latents too",
    )
    parser.add_argument("--prompt", default="a boat on a lake", help="may have scenes")
    parser.add_argument("--num_streams", type=int, help="measure streams that take turns, not the parts")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument(
        "--baseline",
        action="store_true",
        help="a table: the published way of computing the same video, ours, ours compiled, and the kernels alone",
    )
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[], help="more clips for that table")
    parser.add_argument("--lengths", type=int, nargs="+", default=[], help="more clips, of as many frames")
    parser.add_argument("--profile", action="store_true", help="with that table, the time of the kernels by kind")
    args = parser.parse_args(argv)
    if not args.baseline and (args.batch_sizes or args.lengths or args.profile):
        raise UserError("--batch_sizes, --lengths and --profile belong to --baseline.")
    if args.baseline and (args.num_streams or args.offload != "none" or args.tiny_decoder):
        raise UserError("--baseline keeps all models on the device and takes no --num_streams or --tiny_decoder.")
    if args.baseline and (args.compile or args.quantization):
        raise UserError("--baseline has a column that is compiled, and takes no --compile or --quantization.")
    if args.quantization and args.offload != "none":
        raise UserError("--quantization is measured with all models on the device: --offload none.")
    if args.compile and args.offload == "group":
        raise UserError("--compile needs --offload none or model: layers that come one by one cannot be compiled.")
    if args.quantization:
        if args.dtype != "bfloat16":
            raise UserError(f"--quantization needs --dtype bfloat16, not {args.dtype}.")
        quantization_config(args.quantization, torch.device(args.device))  # what it cannot be is said now
    with limited_memory(torch.device(args.device), args.memory_gb, argv):
        return run(args)


def run(args: argparse.Namespace) -> Measurement | StreamMeasurement | dict[str, Measurement]:
    dtype = getattr(torch, args.dtype)
    recipe = recipe_of(args.recipe, args.model)
    home = args.device if args.offload == "none" else "cpu"
    pipe = random_pipeline(recipe, args.device, dtype, home) if recipe else load_from(args.model, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    if args.tiny_decoder:
        add_tiny_decoder(pipe, args.tiny_decoder, dtype)
    if args.quantization:
        from quantization_error import quantize_blocks

        size = video_size(pipe.to(args.device), args.height, args.width, args.num_frames, args.prompt)
        errors = quantize_blocks(pipe, args.quantization, args.prompt, size["height"], size["width"])
        print("  ".join(f"relative error of the {name} {error:.4f}" for name, error in errors.items()))
    prepare_pipeline(pipe, torch.device(args.device), args.offload, args.vae_tiling, args.attention_backend)
    sizes = {name: getattr(args, name) for name in ("num_frames", "height", "width") if getattr(args, name)}
    arguments = {"prompt": args.prompt, "num_videos_per_prompt": args.batch_size, **sizes}
    with as_user_error("cannot measure that", (*CHECKED, FloatingPointError)):
        if args.compile:
            print(f"compiled in {pipe.compile(**arguments):.0f} s")
        if args.baseline:
            clip = Clip(args.batch_size, **video_size(pipe, args.height, args.width, args.num_frames, args.prompt))
            others = [replace(clip, batch_size=size) for size in args.batch_sizes]
            others += [replace(clip, num_frames=pipe.round_num_frames(length)) for length in args.lengths]
            return compare(pipe, torch.device(args.device), args.prompt, clip, args.repetitions, others, args.profile)
        if args.num_streams:
            result = measure_streams(pipe, args.num_streams, **arguments)
        else:
            result = measure(pipe, args.repetitions, **arguments)
    print("  ".join(f"{name} {value:.3f}" for name, value in asdict(result).items()))
    return result


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
