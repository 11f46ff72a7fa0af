"""The adapter on the Hub."""

from __future__ import annotations

from pathlib import Path

from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from huggingface_hub import create_repo, upload_folder

from .checkpoints import WEIGHT_NAMES
from .config import NFTConfig
from .errors import as_user_error
from .policies import CURRENT


FILES = ("README.md", WEIGHT_NAMES[CURRENT], "config.yaml", "rewards.png", "before_after.png", "before_after.mp4")


def create_hub_repo(config: NFTConfig) -> str:
    """Makes sure that the repository exists and may be written to; returns its full name."""
    name = config.hub_model_id or Path(config.output_dir).resolve().name
    with as_user_error(f"push_to_hub: cannot create {name}"):
        return create_repo(name, exist_ok=True, token=config.hub_token).repo_id


def push_to_hub(config: NFTConfig, repo_id: str, table: str):
    """Uploads the adapter of a finished run with a model card that shows `table`, the before/after table."""
    output_dir = Path(config.output_dir)
    description = f"""LoRA for `{config.pretrained_model_name_or_path}`, trained with NFT on \
{", ".join(config.rewards)} by astrolabe_diffusers.

```python
import astrolabe_diffusers
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{config.pretrained_model_name_or_path}")
pipe.load_lora_weights("{repo_id}")
```

```
{table}
```
"""
    card = load_or_create_model_card(
        repo_id_or_path=repo_id,
        token=config.hub_token,
        from_training=True,
        base_model=config.pretrained_model_name_or_path,
        model_description=description,
    )
    tags = ["text-to-video", "diffusers", "lora", "reinforcement-learning"]
    populate_model_card(card, tags=tags).save(output_dir / "README.md")
    upload_folder(
        repo_id=repo_id,
        folder_path=output_dir,
        allow_patterns=list(FILES),
        commit_message="End of training",
        token=config.hub_token,
    )
