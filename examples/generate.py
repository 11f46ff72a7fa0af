"""Generates many videos, on all processes of `accelerate launch`, and writes each as MP4 while it is generated.

    accelerate launch examples/generate.py --prompts prompts.txt --model FOLDER_OR_HUB_ID --output_dir videos

The same command again makes what is missing.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys

from astrolabe_diffusers.cli.arguments import ArgumentParser
from astrolabe_diffusers.generation.config import DTYPES, OFFLOADS, GenerationConfig, name_and_weight
from astrolabe_diffusers.generation.run import generate_videos
from astrolabe_diffusers.training import exit_code


def parse_args(argv: list[str] | None) -> GenerationConfig:
    parser = ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # What is not given has the default of GenerationConfig.
        argument_default=argparse.SUPPRESS,
    )
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", help="one prompt")
    prompts.add_argument("--prompts", help="a .txt file, a .jsonl file (objects with a `prompt`), or a dataset")
    parser.add_argument("--data_dir", help="folder inside the dataset's repository")
    parser.add_argument("--column", help="column of the dataset that has the prompts [prompt or text]")
    parser.add_argument("--split", help="split of the dataset, such as train or test[:100] [train]")
    parser.add_argument("--plain_prompts", action="store_true", help="prompts without scenes: | and [ mean themselves")
    parser.add_argument("--output_dir", help="folder of the videos and manifest.jsonl [videos]")
    parser.add_argument("--model", help="folder or Hub id of a CausalWanPipeline [the embedded one]")
    parser.add_argument(
        "--import_modules",
        action="extend",
        nargs="+",
        help="modules with classes of your own that the model's folder names",
    )
    parser.add_argument("--revision", help="revision of the model on the Hub")
    parser.add_argument("--variant", help="variant of the weight files, such as bf16")
    parser.add_argument(
        "--lora",
        action="extend",
        nargs="+",
        type=name_and_weight,
        metavar="NAME[=WEIGHT]",
        help="LoRAs: folders of training runs or of checkpoints, files, or Hub ids",
    )
    parser.add_argument("--lora_scale", type=float, help="factor of all LoRAs together [1]")
    parser.add_argument("--num_frames", type=int, help="frames of a video [the model's]")
    parser.add_argument("--height", type=int, help="in pixels [the model's]")
    parser.add_argument("--width", type=int, help="in pixels [the model's]")
    parser.add_argument("--seed", type=int, help="gives every video random numbers of its own [0]")
    parser.add_argument("--num_videos_per_prompt", type=int, help="[1]")
    parser.add_argument("--batch_size", type=int, help="videos that each process generates at a time [1]")
    parser.add_argument("--fps", type=int, help="frames per second of the files [the model's]")
    parser.add_argument("--sigmas", nargs="+", type=float, help="noise levels of the denoising steps [the model's]")
    parser.add_argument("--max_sequence_length", type=int, help="text tokens [the model's]")
    parser.add_argument("--dtype", choices=DTYPES, help="[float32 on a CPU, else bfloat16]")
    parser.add_argument("--offload", choices=OFFLOADS, help="what leaves the GPU while it is not used [none]")
    parser.add_argument("--vae_tiling", action="store_true", help="decode in tiles: less memory")
    parser.add_argument("--attention_backend", help="of diffusers [the fastest exact kernel of torch]")
    parser.add_argument("--reward", metavar="NAME[=WEIGHT],...", help="score the videos; as --rewards of train_nft.py")
    parser.add_argument("--reward_options", metavar="NAME.ARGUMENT=VALUE,...", help="arguments of rewards")
    parser.add_argument("--reward_placement", metavar="NAME=PLACE,...", help="where rewards are scored [trainer]")
    parser.add_argument("--reward_timeout", help="seconds after which a batch's rewards count as hung [600]")
    arguments = vars(parser.parse_args(argv))
    names = [name for name, _ in arguments.get("lora", [])]
    if twice := {name for name in names if names.count(name) > 1}:
        parser.error(f"--lora: {min(twice)} is given twice")
    arguments["lora"] = dict(arguments.get("lora", []))
    arguments["reward"] = dict(name_and_weight(part) for part in arguments.get("reward", "").split(",") if part)
    return GenerationConfig(**arguments)


def main(argv: list[str] | None = None) -> int:
    try:
        return exit_code(lambda: generate_videos(parse_args(argv)))
    except KeyboardInterrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("interrupted: the same command makes the videos that are missing.", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
