"""The settings of a run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from .. import TINY_SHAPES
from ..config import import_modules, refuse_secrets
from ..errors import UserError, as_user_error
from ..pipelines.prompt_tokens import check_sequence_length
from ..pipelines.sigmas import check_sigmas
from ..rewards.config import RewardConfig


DTYPES = ("float32", "bfloat16", "float16")
OFFLOADS = ("none", "model", "group")


@dataclass
class GenerationConfig:
    """Settings of [`generate_videos`]; what is `None` comes from the pipeline. Values are checked when it is made.

    Args:
        prompt: the only prompt; or give `prompts`.
        prompts: a .txt or .jsonl file as the trainer reads it, or a dataset of `datasets`, id or folder.
        data_dir, column, split:
            where a dataset has its prompts; `split` may be a slice such as `"test[:100]"`.
        plain_prompts: `|` and `[` in the prompts are characters like any other, not scenes and durations.
        output_dir: folder of the videos and their manifest.
        model: folder or Hub id of a [`CausalWanPipeline`].
        import_modules: modules with classes of your own that the model's folder names.
        revision, variant: of the model, as for `from_pretrained`.
        lora: LoRAs and their weights: folders (of a checkpoint or of a run), files or Hub ids.
        lora_scale: factor of all LoRAs together.
        num_frames, height, width: size of every video in frames and pixels.
        seed: with the index of the prompt and the number of the video it decides all random numbers of a video.
        num_videos_per_prompt: videos for each prompt.
        batch_size: videos that each process generates at a time; it does not change them.
        fps: frames per second of the files.
        sigmas: noise levels of the denoising steps of every block, falling, in [0, 1].
        max_sequence_length: text tokens.
        dtype: one of `DTYPES`; by default float32 on a CPU and bfloat16 elsewhere.
        offload: what leaves the GPU while it is not used: one of `OFFLOADS`.
        vae_tiling: decode in tiles, with less memory.
        attention_backend: of diffusers; by default the fastest exact kernel of torch.
        reward: rewards that score the videos, and their weights. Whole videos are then kept in memory, a batch at a
            time.
        reward_options, reward_placement, reward_timeout: as in training.
    """

    prompt: str | None = None
    prompts: str | None = None
    data_dir: str | None = None
    column: str | None = None
    split: str = "train"
    plain_prompts: bool = False
    output_dir: str = "videos"
    model: str = TINY_SHAPES
    import_modules: list[str] = field(default_factory=list)
    revision: str | None = None
    variant: str | None = None
    lora: dict[str, float] = field(default_factory=dict)
    lora_scale: float = 1.0
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    seed: int = 0
    num_videos_per_prompt: int = 1
    batch_size: int = 1
    fps: int | None = None
    sigmas: list[float] | None = None
    max_sequence_length: int | None = None
    dtype: str | None = None
    offload: str = "none"
    vae_tiling: bool = False
    attention_backend: str | None = None
    reward: dict[str, float] = field(default_factory=dict)
    reward_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    reward_placement: dict[str, str] = field(default_factory=dict)
    reward_timeout: float = RewardConfig.reward_timeout

    def __post_init__(self):
        refuse_secrets(asdict(self))
        import_modules(self.import_modules)
        checked = RewardConfig(
            reward_options=self.reward_options,
            reward_placement=self.reward_placement,
            reward_timeout=self.reward_timeout,
        )
        for name in ("reward_options", "reward_placement", "reward_timeout"):
            setattr(self, name, getattr(checked, name))
        if (self.prompt is None) == (self.prompts is None):
            raise UserError("give either prompt, a text, or prompts, a file or a dataset.")
        for name in (
            "num_frames",
            "height",
            "width",
            "num_videos_per_prompt",
            "batch_size",
            "fps",
            "max_sequence_length",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}.")
        for name, choices in (("dtype", (None, *DTYPES)), ("offload", OFFLOADS)):
            value = getattr(self, name)
            if value not in choices:
                raise UserError(f"{name} must be one of {', '.join(filter(None, choices))}, not {value}.")
        for name, value in {"lora_scale": self.lora_scale, **self.lora}.items():
            if not math.isfinite(value):
                raise UserError(f"the weight of {name!r} must be a finite number, not {value}.")
        if self.lora_scale != 1 and not self.lora:
            raise UserError("lora_scale needs a lora.")
        if (self.reward_options or self.reward_placement) and not self.reward:
            raise UserError("reward_options and reward_placement need a reward.")
        with as_user_error("settings"):
            if self.sigmas is not None:
                check_sigmas(self.sigmas)
            if self.max_sequence_length is not None:
                check_sequence_length(self.max_sequence_length)


def name_and_weight(text: str) -> tuple[str, float]:
    """`"name=weight"`, or `"name"` for the weight 1."""
    name, equals, weight = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        return name, float(weight)
    except ValueError:
        raise UserError(f"the weight of {name!r} must be a number, as in {name}=0.5, not {weight!r}.") from None
