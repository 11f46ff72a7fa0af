"""`astrolabe convert`."""

import argparse
import os
import shlex
from pathlib import Path

from ..conversion.config import ConversionConfig
from ..errors import UserError, as_user_error, one_line
from ..layouts.published_models import PUBLISHED_MODELS
from .arguments import ArgumentParser, command
from .options import parse_fields


@command
def main(argv: list[str] | None):
    sources = "\n".join(f"  {name:33} {model.source}" for name, model in PUBLISHED_MODELS.items())
    parser = ArgumentParser(
        prog="astrolabe convert",
        description="Converts a published checkpoint to a Diffusers pipeline folder, or a published LoRA to a "
        "Diffusers LoRA.",
        epilog=f"recipes and where their weights are published:\n{sources}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    convert(ConversionConfig(**parse_fields(parser, ConversionConfig, argv)))


def convert(config: ConversionConfig):
    """Writes the folder, and pushes it if asked for."""
    from huggingface_hub import HfApi

    from ..conversion import convert as conversion

    repo_id = config.hub_model_id or os.path.basename(os.path.abspath(config.output_dir))
    if config.push_to_hub:  # known before the work
        try:
            repo_id = HfApi().create_repo(repo_id, exist_ok=True).repo_id
        except Exception as error:
            raise UserError(f"push_to_hub: cannot create {repo_id}: {one_line(error)}") from error
    with as_user_error(f"cannot convert {config.checkpoint or config.lora}"):
        names = conversion.convert(config)
    print(f"written: {config.output_dir}")
    if config.push_to_hub:
        push(HfApi(), repo_id, Path(config.output_dir), names)


def push(hub, repo_id: str, folder: Path, names: tuple[str, ...]):
    # What else lies in the folder is nobody's business.
    patterns = [pattern for name in names for pattern in (name, f"{name}/*")]
    try:
        print(hub.upload_folder(folder_path=folder, repo_id=repo_id, allow_patterns=patterns))
    except Exception as error:  # of the Hub, or of the way to it
        include = [word for pattern in patterns for word in ("--include", pattern)]
        command = shlex.join(["hf", "upload", repo_id, str(folder), ".", *include])
        raise UserError(f"not pushed to {repo_id}: {one_line(error)}. Later: {command}") from error
