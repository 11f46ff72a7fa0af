"""The settings of a run."""

from dataclasses import dataclass

from ..config import option
from ..errors import UserError, as_user_error
from ..pipelines.quantization import QUANTIZATIONS
from ..pipelines.scene_prompt import check_sequence_length
from ..pipelines.sigmas import check_sigmas
from ..rollout.config import VideoConfig


DTYPES = ("float32", "bfloat16", "float16")
OFFLOADS = ("none", "model", "group")


@dataclass
class GenerationConfig(VideoConfig):
    """Settings of [`generate_videos`]; what is `None` comes from the pipeline. Checked when the object is made."""

    aliases = {"data_dir": "prompts_data_dir", "column": "prompt_column", "reward": "rewards"}

    prompt: str | None = option(None, "the only prompt; or give prompts")
    prompts: str | None = option(None, "a .txt or .jsonl file (objects with a `prompt`), or a dataset, id or folder")
    split: str = option("train", "split of a dataset, also a slice such as test[:100]")
    plain_prompts: bool = option(False, "prompts without scenes: | and [ in them mean themselves")
    output_dir: str = option("videos", "folder of the videos and manifest.jsonl")
    lora: dict[str, float] = option(
        {}, "LoRAs, PATH or PATH=WEIGHT: folders of training runs or of checkpoints, files, or Hub ids", many=True
    )
    lora_scale: float = option(1.0, "factor of all LoRAs together")
    seed: int = option(0, "with the numbers of a prompt and of a video it decides all random numbers of that video")
    num_videos_per_prompt: int = option(1, "videos for each prompt", minimum=1)
    batch_size: int = option(1, "videos that each process generates at a time; it does not change them", minimum=1)
    fps: int | None = option(None, "frames per second of the files; the model's own if not given", minimum=1)
    sigmas: list[float] = option([], "noise levels of a block's steps before the shift; the model's own if not given")
    max_sequence_length: int | None = option(None, "text tokens; the model's own if not given")
    dtype: str | None = option(None, "float32 on a CPU and bfloat16 elsewhere if not given", choices=DTYPES)
    quantization: str | None = option(
        None, "8-bit linear layers by torchao, in bfloat16, and not the exact frames", choices=QUANTIZATIONS
    )
    offload: str = option("none", "what leaves the GPU while it is not used", choices=OFFLOADS)
    compile: bool = option(False, "compile the transformer first, for many videos; they differ by rounding")
    tiny_decoder: str | None = option(
        None, "decode with this published file or folder: fast, and not the exact frames"
    )
    vae_tiling: bool = option(False, "decode in tiles, with less memory")
    attention_backend: str | None = option(None, "a backend of diffusers; torch's fastest exact kernel if not given")
    rewards: dict[str, float] = option(
        {}, "score the videos, name or name=weight,name=weight; a batch of whole videos is then in memory"
    )

    def __post_init__(self):
        super().__post_init__()
        if (self.prompt is None) == (self.prompts is None):
            raise UserError("give either prompt, a text, or prompts, a file or a dataset.")
        if self.compile and self.offload == "group":
            raise UserError("compile needs offload none or model: layers that come one by one cannot be compiled.")
        if self.quantization and self.dtype not in (None, "bfloat16"):
            raise UserError(f"quantization needs dtype bfloat16, not {self.dtype}: what is not quantised is in that.")
        if self.lora_scale != 1 and not self.lora:
            raise UserError("lora_scale needs a lora.")
        if (self.reward_options or self.reward_placement) and not self.rewards:
            raise UserError("reward_options and reward_placement need rewards.")
        with as_user_error("settings"):
            if self.sigmas:
                check_sigmas(self.sigmas)
            if self.max_sequence_length is not None:
                check_sequence_length(self.max_sequence_length)
