"""What all commands that make videos from prompts are told."""

from dataclasses import dataclass

from ..config import Config, option
from ..errors import UserError, as_user_error
from ..pipelines.config import ModelConfig
from ..pipelines.scene_prompt import TRANSITIONS
from ..pipelines.sigmas import check_sigmas
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


@dataclass
class RecipeConfig(Config):
    """How the model attends and samples, in training and where its LoRAs are judged."""

    local_attn_size: int | None = option(None, "window in latent frames, -1 for all; the model's own if not given")
    sink_size: int | None = option(None, "latent frames that stay in sight; the model's own if not given", minimum=0)
    sigmas: list[float] = option([], "noise levels of a block's steps before the shift; the model's own if not given")
    num_context_frames: int | None = option(
        None,
        "0: Krea 14B with a cache that grows, not its server's way, which cannot be trained; the model's own if not "
        "given",
        minimum=0,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.sigmas:
            with as_user_error("settings"):
                check_sigmas(self.sigmas)


@dataclass
class SwitchConfig(Config):
    """How videos change their prompt on the way."""

    transitions: list[str] = option(
        [], f"prompts change on the way, once by each of these: {', '.join(TRANSITIONS)}; not at all if not given"
    )
    transition_blocks: int = option(1, "blocks over which `roll` goes from the old text to the new one", minimum=1)
    recache_sink: bool = option(True, "`recache` keeps the sink, as it was made with the old prompt")
    switch_prompts: str = option(
        "pairs",
        "old and new prompt: two of the prompts, drawn at random; or the `scenes` of one, `a cat [2s] | a dog`",
        choices=("pairs", "scenes"),
    )

    def __post_init__(self):
        super().__post_init__()
        for name in self.transitions:
            if name not in TRANSITIONS:
                raise UserError(f"transitions: {name!r} is none of {', '.join(TRANSITIONS)}.")
        if self.transition_blocks > 1 and "roll" not in self.transitions:
            raise UserError(f"transition_blocks={self.transition_blocks} is of roll, which is none of transitions.")
