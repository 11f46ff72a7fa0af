"""Converts a published checkpoint to a Diffusers pipeline folder, or a published LoRA to a Diffusers LoRA."""

import argparse
from pathlib import Path

import torch
from huggingface_hub import HfApi

from astrolabe_diffusers.loaders.conversion import convert_checkpoint, convert_lora
from astrolabe_diffusers.loaders.published_models import PUBLISHED_MODELS


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    sources = "\n".join(f"  {name:32} {model.source}" for name, model in PUBLISHED_MODELS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"models and where their weights are published:\n{sources}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=PUBLISHED_MODELS, help="what --checkpoint is")
    parser.add_argument("--checkpoint", type=Path, help="the published .pt or .safetensors file")
    parser.add_argument("--base", help="Wan2.1 pipeline in Diffusers format of the same size: folder or Hub id")
    parser.add_argument("--lora", type=Path, help="merged into the checkpoint; without --checkpoint, converted itself")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--dtype", choices=DTYPES, help="of the transformer; by default as in the file")
    parser.add_argument("--push_to_hub", action="store_true")
    parser.add_argument("--hub_model_id", help="by default the name of --output_dir")
    args = parser.parse_args(argv)
    if args.checkpoint is None and args.lora is None:
        parser.error("nothing to convert: give --checkpoint, --lora or both.")
    if args.checkpoint is not None and (args.model is None or args.base is None):
        parser.error("--checkpoint needs --model and --base.")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        if args.checkpoint is None:
            convert_lora(args.lora, args.output_dir)
        else:
            convert_checkpoint(
                PUBLISHED_MODELS[args.model],
                args.checkpoint,
                args.base,
                args.output_dir,
                lora=args.lora,
                dtype=DTYPES.get(args.dtype),
            )
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"written: {args.output_dir}")
    if args.push_to_hub:
        api = HfApi()
        repo_id = api.create_repo(args.hub_model_id or args.output_dir.name, exist_ok=True).repo_id
        print(api.upload_folder(folder_path=args.output_dir, repo_id=repo_id))


if __name__ == "__main__":
    main()
