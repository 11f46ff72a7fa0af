"""What all commands that make videos from prompts are told."""

from dataclasses import dataclass

from .. import TINY_SHAPES
from ..config import option
from ..rewards.config import RewardConfig


@dataclass
class VideoConfig(RewardConfig):
    """The model, where prompts come from, and the size of the videos."""

    model: str = option(TINY_SHAPES, "folder or Hub id of a CausalWanPipeline")
    revision: str | None = option(None, "revision of the model on the Hub")
    variant: str | None = option(None, "variant of the weight files, such as bf16")
    prompts: str | None = option(
        None,
        "a .txt or .jsonl file, a folder with test.txt (or .jsonl, or _metadata.jsonl), or a dataset, id or folder; "
        "the model's own folder prompts/ if not given",
    )
    prompts_data_dir: str | None = option(None, "folder inside a dataset's repository")
    prompt_column: str | None = option(None, "column of a dataset; `prompt` or `text` if not given")
    height: int | None = option(None, "height of the videos in pixels; the model's own if not given", minimum=1)
    width: int | None = option(None, "width of the videos in pixels; the model's own if not given", minimum=1)
    num_frames: int | None = option(None, "frames of a video; the model's own if not given", minimum=1)
