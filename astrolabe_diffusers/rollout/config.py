"""What all commands that make videos from prompts are told."""

from dataclasses import dataclass

from ..config import option
from ..pipelines.config import ModelConfig
from ..rewards.config import RewardConfig


@dataclass
class VideoConfig(ModelConfig, RewardConfig):
    """Where prompts come from, and the length of the videos."""

    prompts: str | None = option(
        None,
        "a .txt or .jsonl file, a folder with test.txt (or .jsonl, or _metadata.jsonl), or a dataset, id or folder; "
        "the model's own folder prompts/ if not given",
    )
    prompts_data_dir: str | None = option(None, "folder inside a dataset's repository")
    prompt_column: str | None = option(None, "column of a dataset; `prompt` or `text` if not given")
    num_frames: int | None = option(None, "frames of a video; the model's own if not given", minimum=1)
