"""The settings of evaluations."""

import re
from dataclasses import dataclass
from pathlib import Path

from ..config import name_and_weight, option
from ..distributed.accelerator import PRECISIONS
from ..errors import UserError
from ..rewards.config import RewardConfig
from ..rollout.config import RecipeConfig, SwitchConfig, VideoConfig


BASE = "base"


@dataclass
class ScoreConfig(RewardConfig):
    """How videos are scored. Checked when the object is made."""

    aliases = {"reward": "rewards"}

    prompt: str | None = option(None, "what the videos were made from; the manifest of generated folders has it")
    rewards: dict[str, float] = option({"motion_smoothness": 1.0}, "rewards: name,name or name=weight,name=weight")
    output: str | None = option(None, "the JSON file; if not given, scores.json in the folder, or NAME.scores.json")
    overwrite: bool = option(False, "write over a file that is no earlier result")


@dataclass
class LoraEvaluationConfig(VideoConfig, RecipeConfig, SwitchConfig):
    """Settings of an evaluation. With those of a run, its figures come out again. Checked when the object is made."""

    lora: list[str] = option(
        [], "PATH or PATH=WEIGHT, folder or Hub id of a LoRA, a column of its name; give it again for further columns"
    )
    column: list[str] = option([], "NAME=PATH or NAME=PATH=WEIGHT: a LoRA's column with a name of its own")
    eval_split: str = option("test", "split of a folder or a dataset")
    rewards: list[str] = option(
        ["tiny_shapes_prompt_match", "motion_smoothness", "sharpness", "flicker"], "rewards, comma-separated"
    )
    num_prompts: int = option(62, "how many of the prompts, spread evenly over the file", minimum=1)
    seeds: int = option(4, "videos for each prompt; the same seeds in every column, evaluation and run", minimum=1)
    batch_size: int = option(8, "videos in a batch on each device", minimum=1)
    num_videos: int = option(8, "videos that are kept of each column and shown side by side", minimum=0)
    mixed_precision: str | None = option(None, "accelerate's setting if not given", choices=PRECISIONS)
    vae_dtype: str | None = option(
        None, "of the decoder, whose frames are scored; the rest's if not given", choices=("float32", "bfloat16")
    )
    output_dir: str = option("eval", "everything the evaluation writes; an earlier evaluation there is written over")
    overwrite: bool = option(False, "write over files in output_dir that no evaluation has made")

    def __post_init__(self):
        super().__post_init__()
        if not self.rewards:
            raise UserError("rewards is empty: name at least one.")
        # LoRA and weight of each column by its name.
        self.columns: dict[str, tuple[str | None, float]] = {BASE: (None, 1.0)}
        for text in self.lora:
            path, weight = name_and_weight(text)
            # NAME=PATH is how a column was named before --column.
            name, equals, renamed = path.partition("=")
            self._add_column(name if equals else Path(path).resolve().name, renamed or path, weight)
        for text in self.column:
            name, equals, lora = text.partition("=")
            if not equals:
                raise UserError(f"column must be NAME=PATH or NAME=PATH=WEIGHT, not {text!r}.")
            self._add_column(name, *name_and_weight(lora))

    def _add_column(self, name: str, path: str, weight: float):
        if not re.fullmatch(r"\w[\w. +-]*", name):
            raise UserError(
                f"{name!r} cannot name a column and its folder; choose a name of letters, digits, '.', '_', '+' or "
                f"'-', as in --column NAME={path}."
            )
        if name in self.columns:
            raise UserError(f"a column {name!r} is there already; give another name, as in --column NAME={path}.")
        self.columns[name] = (path, weight)
