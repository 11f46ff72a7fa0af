"""Converts a published checkpoint to a Diffusers pipeline folder, or a published LoRA to a Diffusers LoRA."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

import torch
from huggingface_hub import HfApi

from astrolabe_diffusers.cli.arguments import ArgumentParser
from astrolabe_diffusers.conversion import LORA_FILES, PIPELINE_FILES, convert_checkpoint, convert_lora
from astrolabe_diffusers.errors import as_user_error, one_line
from astrolabe_diffusers.layouts.published_models import PUBLISHED_MODELS
from astrolabe_diffusers.training import UserError, exit_code


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    sources = "\n".join(f"  {name:32} {model.source}" for name, model in PUBLISHED_MODELS.items())
    parser = ArgumentParser(
        description=__doc__,
        epilog=f"models and where their weights are published:\n{sources}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=PUBLISHED_MODELS, help="what --checkpoint is")
    parser.add_argument("--checkpoint", type=Path, help="the published file, or a folder of shards")
    parser.add_argument("--base", help="Wan2.1 pipeline in Diffusers format of the same size: folder or Hub id")
    parser.add_argument("--weights", help="entry of the checkpoint to take [the one that the model's authors load]")
    parser.add_argument("--lora", type=Path, help="merged into the checkpoint; without --checkpoint, converted itself")
    parser.add_argument("--lora_alpha", type=float, help="alpha of a --lora that does not say it [its rank]")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true", help="replace files of these names in --output_dir")
    parser.add_argument("--dtype", choices=DTYPES, help="of the transformer [as in the file; float32 for 8-bit]")
    parser.add_argument("--push_to_hub", action="store_true")
    parser.add_argument("--hub_model_id", help="[the name of --output_dir]")
    args = parser.parse_args(argv)
    if args.checkpoint is None and args.lora is None:
        parser.error("nothing to convert: give --checkpoint, --lora or both")
    if args.checkpoint is not None and (args.model is None or args.base is None):
        parser.error("--checkpoint needs --model and --base")
    needs = {"checkpoint": ("model", "base", "weights", "dtype")}
    needs |= {"lora": ("lora_alpha",), "push_to_hub": ("hub_model_id",)}
    for needed, names in needs.items():
        for name in names:
            if getattr(args, name) is not None and not getattr(args, needed):
                parser.error(f"--{name} needs --{needed}")
    return args


def push(repo_id: str, folder: Path, names: tuple[str, ...]):
    # What else lies in the folder is nobody's business.
    patterns = [pattern for name in names for pattern in (name, f"{name}/*")]
    try:
        print(HfApi().upload_folder(folder_path=folder, repo_id=repo_id, allow_patterns=patterns))
    except Exception as error:  # of the Hub, or of the way to it
        include = [word for pattern in patterns for word in ("--include", pattern)]
        command = shlex.join(["hf", "upload", repo_id, str(folder), ".", *include])
        raise UserError(f"not pushed to {repo_id}: {one_line(error)}. Later: {command}") from error


def run(argv: list[str] | None):
    args = parse_args(argv)
    repo_id = args.hub_model_id or os.path.basename(os.path.abspath(args.output_dir))
    if args.push_to_hub:  # known before the work
        try:
            repo_id = HfApi().create_repo(repo_id, exist_ok=True).repo_id
        except Exception as error:
            raise UserError(f"push_to_hub: cannot create {repo_id}: {one_line(error)}") from error
    with as_user_error(f"cannot convert {args.checkpoint or args.lora}"):
        if args.checkpoint is None:
            convert_lora(args.lora, args.output_dir, args.overwrite, args.lora_alpha)
        else:
            convert_checkpoint(
                PUBLISHED_MODELS[args.model],
                args.checkpoint,
                args.base,
                args.output_dir,
                lora=args.lora,
                dtype=DTYPES.get(args.dtype),
                weights=args.weights or (),
                overwrite=args.overwrite,
                lora_alpha=args.lora_alpha,
            )
    print(f"written: {args.output_dir}")
    if args.push_to_hub:
        push(repo_id, args.output_dir, LORA_FILES if args.checkpoint is None else PIPELINE_FILES)


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
