"""The settings of a run."""

from dataclasses import dataclass, fields

from ..config import option
from ..errors import UserError, as_user_error
from ..pipelines.config import PipelineConfig
from ..pipelines.sigmas import check_sigmas
from ..rollout.config import VideoConfig


# What a session says itself, or what makes other frames of it.
NOT_OF_SESSIONS = ("seed", "height", "width", "num_frames", "fps", "sigmas", "num_videos_per_prompt", "batch_size")
NOT_OF_SESSIONS += ("lora_scale", "plain_prompts", "rewards")


@dataclass
class GenerationConfig(PipelineConfig, VideoConfig):
    """Settings of [`generate_videos`]; what is `None` comes from the pipeline. Checked when the object is made."""

    aliases = {"data_dir": "prompts_data_dir", "column": "prompt_column", "reward": "rewards"}

    prompt: str | None = option(None, "the only prompt; or give prompts")
    prompts: str | None = option(None, "a .txt or .jsonl file (objects with a `prompt`), or a dataset, id or folder")
    session: str | None = option(None, "a session that `astrolabe live` has saved: the same frames again")
    split: str = option("train", "split of a dataset, also a slice such as test[:100]")
    plain_prompts: bool = option(False, "prompts without scenes: | and [ in them mean themselves")
    output_dir: str = option("videos", "folder of the videos and manifest.jsonl")
    lora_scale: float = option(1.0, "factor of all LoRAs together")
    seed: int = option(0, "with the numbers of a prompt and of a video it decides all random numbers of that video")
    num_videos_per_prompt: int = option(1, "videos for each prompt", minimum=1)
    batch_size: int = option(1, "videos that each process generates at a time; it does not change them", minimum=1)
    fps: int | None = option(None, "frames per second of the files; the model's own if not given", minimum=1)
    sigmas: list[float] = option([], "noise levels of a block's steps before the shift; the model's own if not given")
    rewards: dict[str, float] = option(
        {}, "score the videos, name or name=weight,name=weight; a batch of whole videos is then in memory"
    )

    def __post_init__(self):
        super().__post_init__()
        if [self.prompt, self.prompts, self.session].count(None) != 2:
            raise UserError(
                "give one of prompt, a text, prompts, a file or a dataset, and session, a file of `astrolabe live`."
            )
        if self.session:
            defaults = {f.name: f.default for f in fields(self)}
            for name in NOT_OF_SESSIONS:
                if (value := getattr(self, name)) and value != defaults[name]:
                    raise UserError(f"{name} is not for a session, which says itself how its video is: leave it out.")
        if self.lora_scale != 1 and not self.lora:
            raise UserError("lora_scale needs a lora.")
        if (self.reward_options or self.reward_placement) and not self.rewards:
            raise UserError("reward_options and reward_placement need rewards.")
        with as_user_error("settings"):
            if self.sigmas:
                check_sigmas(self.sigmas)
