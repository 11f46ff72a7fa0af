"""The adapter on the Hub. The token is that of HF_TOKEN or `hf auth login`."""

import shlex
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import HfApi

from ..config import Config
from ..errors import UserError, one_line
from .model_card import video_folder


# Settings and results.json stay here: they name paths of this machine. The card has what is in them.
FILES = ("metrics.jsonl", "eval.jsonl", "rewards.png", "README.md", LORA_WEIGHT_NAME_SAFE)
FILES += tuple(f"before_after.{kind}" for kind in ("mp4", "png", "gif"))


def create_hub_repo(config: Config) -> str:
    """Makes sure that the repository exists and may be written to; returns its full name."""
    name = config.hub_model_id or Path(config.output_dir).resolve().name
    try:
        return HfApi().create_repo(name, exist_ok=True).repo_id
    except Exception as error:  # of the Hub, or of the way to it
        raise UserError(f"push_to_hub: cannot create {name}: {one_line(error)}") from error


def push_to_hub(config: Config, repo_id: str, results: dict[str, Any]) -> str:
    """Uploads what a finished run leaves, its card included, and returns a line about it. A Hub that cannot be reached
    at the end of a long run is no error: the line says how to upload later."""
    patterns = [*FILES, f"{video_folder(results)}/*"]
    try:
        commit = HfApi().upload_folder(
            repo_id=repo_id,
            folder_path=config.output_dir,
            allow_patterns=patterns,
            commit_message=f"{results['steps']} steps of {config.algorithm}",
        )
        return f"pushed to {commit.repo_url}"
    except Exception as error:
        include = [word for pattern in patterns for word in ("--include", pattern)]
        command = shlex.join(["hf", "upload", repo_id, config.output_dir, ".", *include])
        return f"not pushed to {repo_id}: {one_line(error)}; all files are in {config.output_dir}. Later: {command}"
