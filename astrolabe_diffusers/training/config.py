"""Settings of a run of online reinforcement learning."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal

import yaml

from ..config import option
from ..distributed.accelerator import PRECISIONS
from ..errors import UserError
from ..layouts.experts import MEMORY_TRANSFORMER, TRANSFORMER
from ..pipelines.scene_prompt import TRANSITIONS
from ..reporting.tracker_names import TRACKERS
from ..rollout.config import RecipeConfig, SwitchConfig, VideoConfig
from .algorithms import algorithm_name


# Of diffusers.optimization.get_scheduler, those that need nothing else.
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
# The published runs have 1152 at most. What is far beyond is a slip, and would fill the memory with their list.
MAX_EPOCH_SAMPLES = 1_000_000
# Of `train_batch_size`, until the run has found a number.
AUTO = "auto"


@dataclass
class OnlineConfig(VideoConfig, RecipeConfig, SwitchConfig):
    """Settings of online reinforcement learning, whatever the algorithm, which adds its own.

    Names are those of diffusers' example trainers where these have them. The defaults are those published with
    Astrolabe for 8 devices; `recipes/` holds what suits a given model. Values are checked when the object is made.
    """

    # What the model card calls the algorithm, and the address of its paper.
    algorithm: ClassVar[str] = "online reinforcement learning"
    paper: ClassVar[str | None] = None
    # The trainer's class, once one has these settings: what is saved names it.
    trainer: ClassVar[type | None] = None
    aliases = {"pretrained_model_name_or_path": "model", "shared_prefix": "shared_past"}
    removed = {"hub_token": "the token comes from HF_TOKEN or `hf auth login`, and is stored nowhere else"}

    # Data
    prompts: str | None = option(
        None,
        "folder with train and test .txt, .jsonl or _metadata.jsonl; one .txt or .jsonl file from which "
        "num_eval_prompts prompts are held out; or a dataset, id or folder; if not given, the model's folder prompts/",
    )
    train_split: str = option("train", "split of a dataset")
    eval_split: str = option("test", "split of a dataset for held-out prompts; the same one: they are held out of it")
    prompt_embeds_dir: str | None = option(
        None,
        "folder of the prompts' text embeddings, which later runs find there: without new prompts they load no text "
        "encoder, and none keeps it; not of a pipeline given in Python",
    )
    output_dir: str = option("lora", "everything the run writes")
    overwrite_output_dir: bool = option(False, "begin anew in an output_dir that has a run, or files of others")
    seed: int = option(42, "seed of LoRA, prompts, samples and training noise", minimum=0, maximum=2**32 - 1)
    eval_num_frames: int | None = option(None, "frames of the held-out videos; num_frames if not given", minimum=1)

    # Streaming long tuning: a window of a longer video is trained (Astrolabe 3.3)
    window_size: int | None = option(None, "latent frames that are scored and trained; all if not given", minimum=1)
    sample_frames: int | None = option(None, "latent frames of the window's video; num_frames if not given", minimum=1)
    window_selection: str = option(
        "random",
        "where the window lies, the same for all samples of an epoch; `choices`: at one of window_choices",
        choices=("random", "first", "last", "choices"),
    )
    window_choices: list[int] = option([], "latent frames at which a window may begin")
    shared_past: bool = option(False, "videos of a group part only at the window: what is before is sampled once")

    # Switches of the prompt, at or before the window
    transitions: list[str] = option(
        [],
        "the window comes after a switch of the prompt, by one of these, drawn for each epoch: "
        f"{', '.join(TRANSITIONS)}; none if not given. Held-out videos are made with each of them",
    )
    switch_distances: list[int] = option([0], "blocks from the switch to the window, one drawn for each epoch")

    # Rollout
    train_batch_size: int | Literal["auto"] = option(
        3,
        "videos in a batch on each device, in sampling and in training; auto: as many as fit a GPU, and what counts "
        "batches counts videos: batches_per_epoch and gradient_accumulation_steps",
        minimum=1,
    )
    batches_per_epoch: int = option(16, "batches an epoch on each device", minimum=1)
    samples_per_prompt: int = option(24, "videos of a group, from one prompt; one has nothing to compare", minimum=2)
    trained_fraction: float = option(
        1.0,
        "of each batch the part that is trained: the videos whose advantages are farthest from 0, the best and the "
        "worst. Losses are means over these",
        above=0,
        maximum=1,
    )
    draws_per_video: int = option(
        1, "how often a trained video is trained in a step, each time with other noise and noise level", minimum=1
    )
    merge_lora: bool = option(
        True,
        "videos for training come from weights with the LoRA merged in: passes cost what the base's do, and the "
        "weights of the layers are there twice meanwhile",
    )

    # Rewards
    rewards: dict[str, float] = option({"tiny_shapes_prompt_match": 1.0}, "rewards: name, or name=weight,name=weight")
    eval_rewards: list[str] = option([], "rewards that are watched on the held-out prompts and never trained on")
    nan_reward: str = option("stop", "a NaN reward stops the run, or skips its sample", choices=("stop", "skip"))

    # Advantages
    advantage_reward: str = option(
        "composite", "advantages are of the weighted sum, or of the primary reward", choices=("composite", "primary")
    )
    reward_normalization: str = option(
        "none", "before weighting: none, or centred and divided by the spread in the group", choices=("none", "group")
    )
    reward_normalization_size: int | None = option(
        None,
        "reward_normalization=group: of how many samples of a group, in their order, its mean and spread are; of all "
        "if not given",
        minimum=2,
    )
    primary_reward: str | None = option(None, "the reward that may be hacked; the first one if not given")
    advantage_std: str = option(
        "global",
        "what centred rewards are divided by: the spread of all rewards of the epoch, of the group's, or nothing",
        choices=("global", "group", "none"),
    )

    # LoRA
    lora_expert: str = option(
        TRANSFORMER,
        "of a model with a memory transformer: which has the LoRA. The memory transformer's learns through what noisy "
        "blocks see of it, with context=clean_grad",
        choices=(TRANSFORMER, MEMORY_TRANSFORMER, "both"),
    )
    init_lora: str | None = option(None, "LoRA to start from, folder or Hub id: its rank, alpha and modules hold")
    rank: int = option(256, "LoRA rank", minimum=1)
    lora_alpha: int = option(256, "LoRA alpha; the LoRA is scaled by alpha / rank", minimum=1)
    lora_dropout: float = option(0.0, "LoRA dropout", minimum=0, below=1)
    lora_target_modules: list[str] = option(
        [],
        "suffixes of module names; every Linear of the blocks if not given. all-linear: the text and time embeddings' "
        "and the head's too",
    )

    # Optimisation
    num_train_epochs: int = option(100, "length of the run in epochs", minimum=1)
    max_train_steps: int | None = option(None, "length in optimizer steps; goes before num_train_epochs", minimum=1)
    gradient_accumulation_steps: int | None = option(None, "batches a step; batches_per_epoch if not given", minimum=1)
    learning_rate: float = option(1e-5, "peak learning rate", above=0)
    lr_scheduler: str = option("constant", "how the learning rate goes on from its peak", choices=LR_SCHEDULERS)
    lr_warmup_steps: int = option(0, "optimizer steps of warm-up, for `constant` too", minimum=0)
    adam_beta1: float = option(0.9, "beta1 of AdamW", minimum=0, below=1)
    adam_beta2: float = option(0.999, "beta2 of AdamW", minimum=0, below=1)
    adam_weight_decay: float = option(1e-4, "weight decay of AdamW", minimum=0)
    adam_epsilon: float = option(1e-8, "epsilon of AdamW", above=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", above=0)
    mixed_precision: str | None = option(None, "accelerate's setting if not given", choices=PRECISIONS)
    vae_dtype: str | None = option(
        None, "of the decoder, whose frames are scored; the rest's if not given", choices=("float32", "bfloat16")
    )
    ema_decay: float | None = option(
        None,
        "an average of the policy over the steps is what is judged and saved: after step s, counted from 0, "
        "ema = d ema + (1 - d) current, d = min((1 + s) / (10 + s), this)",
        minimum=0,
        below=1,
    )
    collapse_factor: float = option(
        2.0,
        "stop if predicted videos' norm changes by this factor, or in a single step by its square; 0: never",
        minimum=0,
    )
    nan_loss: str = option(
        "stop", "a loss or gradient that is not finite stops the run, or skips its step", choices=("stop", "skip")
    )
    gradient_checkpointing: str = option(
        "none",
        "recompute activations in the backward pass: none; all but those of attention, which take longest; or all, "
        "in the least memory (`false` and `true` are none and full)",
        choices=("none", "selective", "full"),
        alone="full",
    )
    compile: bool | None = option(
        None,
        "compile the transformer's blocks, which takes minutes of the first epoch on a GPU; if not given, on "
        "CUDA where whole videos are trained, in one pass or a block at a time, unless the model is in shards",
        alone="true",
    )
    allow_tf32: bool = option(False, "TF32 matrix products on Ampere GPUs and later")

    # Evaluation on held-out prompts
    eval_steps: int = option(10, "optimizer steps between evaluations; the first is before training", minimum=1)
    num_eval_prompts: int = option(32, "held-out prompts, spread evenly over the file", minimum=1)
    eval_seeds: int = option(2, "videos for each of them; the same seeds in every evaluation and run", minimum=1)
    num_eval_videos: int = option(4, "videos kept of each evaluation, and rows of the before/after sheet", minimum=0)

    # Checkpoints, trackers and the Hub
    checkpointing_steps: int = option(30, "optimizer steps between checkpoints", minimum=1)
    checkpoints_total_limit: int | None = option(None, "checkpoints that are kept", minimum=1)
    resume_from_checkpoint: str | None = option(None, "a checkpoint folder, or `latest` in output_dir")
    report_to: str = option("tensorboard", "trackers; `all`: both", choices=tuple(TRACKERS))
    logging_dir: str = option("logs", "folder of the trackers inside output_dir")
    push_to_hub: bool = option(False, "upload the adapter with its model card, the README.md in output_dir")
    hub_model_id: str | None = option(None, "repository to push to; the name of output_dir if not given")
    hub_base_model: str | None = option(None, "Hub id of the base model for the card, if the model is a local folder")
    hub_license: str | None = option(None, "licence for the card, such as apache-2.0")

    def __post_init__(self):
        # As it was once.
        once = {"true": "full", "false": "none"}
        self.gradient_checkpointing = once.get(str(self.gradient_checkpointing).lower(), self.gradient_checkpointing)
        super().__post_init__()
        if not self.rewards:
            raise UserError("rewards is empty: name at least one reward to train on.")
        if not any(self.rewards.values()):
            raise UserError("all rewards have weight 0: give one another weight, or nothing is learnt.")
        # What is trained on is reported with the others anyway; a preset may watch what a flag then trains on.
        self.eval_rewards = [name for name in self.eval_rewards if name not in self.rewards]
        if 0 < self.collapse_factor <= 1:
            raise UserError(f"collapse_factor must be more than 1, or 0 for never, not {self.collapse_factor}.")
        if self.primary_reward is not None and self.primary_reward not in self.rewards:
            raise UserError(f"primary_reward {self.primary_reward!r} is none of {', '.join(self.rewards)}.")
        if Path(self.logging_dir).is_absolute() or ".." in Path(self.logging_dir).parts:
            raise UserError(f"logging_dir {self.logging_dir!r} must be a folder inside output_dir, such as logs.")
        if self.shared_past and self.window_size is None:
            raise UserError("shared_past needs window_size: without a window there is nothing before it to share.")
        if self.shared_past and self.samples_per_prompt % self._batch_size:
            raise UserError(
                f"with shared_past a batch is of one group: train_batch_size={self.train_batch_size} has to divide "
                f"samples_per_prompt={self.samples_per_prompt}."
            )
        if self.trained_fraction < 1 and self.train_batch_size == AUTO:
            raise UserError(
                "trained_fraction chooses among the videos of a batch, and would choose others in batches of another "
                "size: give train_batch_size a number."
            )
        if self.trained_fraction < 1 and self.trained_videos == self.train_batch_size:
            raise UserError(
                f"trained_fraction={self.trained_fraction:g} of train_batch_size={self.train_batch_size} leaves no "
                "video out: raise train_batch_size, or lower the fraction."
            )
        if self.transitions and self.window_size is None:
            raise UserError("transitions need window_size: the window, after the switch, is what is trained.")
        if "cut" in self.transitions and self.shared_past:
            raise UserError("transitions with cut and shared_past: after a cut there is no past to share.")
        if not self.switch_distances or min(self.switch_distances) < 0:
            raise UserError(f"switch_distances must be numbers of blocks, 0 or more, not {self.switch_distances}.")
        if self.samples_per_prompt % (self.reward_normalization_size or 1):
            raise UserError(
                f"reward_normalization_size={self.reward_normalization_size} does not divide samples_per_prompt="
                f"{self.samples_per_prompt}; it can be {_listing(_divisors(self.samples_per_prompt)[1:])}."
            )
        if self.gradient_accumulation_steps is None:
            self.gradient_accumulation_steps = self.batches_per_epoch
        if self.batches_per_epoch % self.gradient_accumulation_steps:
            raise UserError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} does not divide "
                f"batches_per_epoch={self.batches_per_epoch}; it can be {_listing(_divisors(self.batches_per_epoch))}."
            )
        if self.max_train_steps is None:
            self.max_train_steps = self.num_train_epochs * self.steps_per_epoch
        if self.max_train_steps % self.steps_per_epoch:
            lower = self.max_train_steps // self.steps_per_epoch * self.steps_per_epoch
            valid = [n for n in (lower, lower + self.steps_per_epoch) if n]
            raise UserError(
                f"max_train_steps={self.max_train_steps} is no whole number of epochs of {self.steps_per_epoch} "
                f"optimizer steps; the nearest are {_listing(valid)}."
            )
        self.num_train_epochs = self.max_train_steps // self.steps_per_epoch

    def check_resumed(self, step: int, name: str):
        """A `UserError` unless a run that goes on from checkpoint `name`, of this step, ends with a whole epoch."""
        left = self.max_train_steps - step
        if left > 0 and left % self.steps_per_epoch:
            fits = [n for n in _divisors(self.batches_per_epoch) if step % (self.batches_per_epoch // n) == 0]
            fits = [n for n in fits if self.max_train_steps % (self.batches_per_epoch // n) == 0]
            raise UserError(
                f"from {name} to max_train_steps={self.max_train_steps} is no whole number of epochs of "
                f"{self.steps_per_epoch} optimizer steps; with batches_per_epoch={self.batches_per_epoch} "
                f"gradient_accumulation_steps can be {_listing(fits)}."
            )

    @property
    def lora_components(self) -> list[str]:
        """The pipeline's components that have the LoRA."""
        return [TRANSFORMER, MEMORY_TRANSFORMER] if self.lora_expert == "both" else [self.lora_expert]

    @property
    def judged_policy(self) -> str:
        """The policy that is evaluated and saved at the end."""
        return "current" if self.ema_decay is None else "ema"

    @property
    def other_adapters(self) -> list[str]:
        """Adapters beside the current policy's, in the order in which they are made."""
        return ["ema"] * (self.ema_decay is not None)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch."""
        return self.batches_per_epoch // self.gradient_accumulation_steps

    @property
    def _batch_size(self) -> int:
        """As what counts batches has it."""
        return 1 if self.train_batch_size == AUTO else self.train_batch_size

    @property
    def trained_videos(self) -> int:
        """Of a batch those that are trained."""
        return max(round(self.trained_fraction * self._batch_size), 1)

    def batch_sizes(self) -> list[int]:
        """What `train_batch_size` can be, the largest first, with as many samples a step and an epoch as there are."""
        sizes = _divisors(self._batch_size * self.gradient_accumulation_steps)
        return [size for size in reversed(sizes) if not self.shared_past or self.samples_per_prompt % size == 0]

    def set_batch_size(self, size: int):
        """One of [`~OnlineConfig.batch_sizes`], with as many batches as that makes."""
        for name in ("batches_per_epoch", "gradient_accumulation_steps"):
            setattr(self, name, self._batch_size * getattr(self, name) // size)
        self.train_batch_size = size

    def groups_per_epoch(self, num_processes: int) -> int:
        """Prompts an epoch on all processes together; a `UserError` unless that is a whole number."""
        samples = num_processes * self._batch_size * self.batches_per_epoch
        if samples % self.samples_per_prompt:
            processes = f"{num_processes} process{'es' if num_processes > 1 else ''}"
            videos = " videos" if self.train_batch_size == AUTO else ""
            raise UserError(
                f"{processes} x train_batch_size {self.train_batch_size} x batches_per_epoch {self.batches_per_epoch}"
                f"{videos} = {samples} samples an epoch are no whole number of groups of samples_per_prompt="
                f"{self.samples_per_prompt}; samples_per_prompt can be {_listing(_divisors(samples)[1:])}."
            )
        if samples > MAX_EPOCH_SAMPLES:
            raise UserError(
                f"{samples} samples an epoch are more than {MAX_EPOCH_SAMPLES}: lower train_batch_size or "
                "batches_per_epoch."
            )
        return samples // self.samples_per_prompt

    def save(self, path: str | Path):
        """Writes every setting as YAML; a run with `--config path` repeats this one, and numbers that follow from
        others follow where these are changed. What may be written over is said anew for each."""
        values = {name: value for name, value in asdict(self).items() if name != "overwrite_output_dir"}
        values["max_train_steps"] = None  # as many as the epochs have
        if self.gradient_accumulation_steps == self.batches_per_epoch:
            values["gradient_accumulation_steps"] = None
        if self.trainer is not None:
            values = {"algorithm": algorithm_name(self.trainer)} | values
        Path(path).write_text(yaml.safe_dump(values, sort_keys=False))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _listing(values: list[int]) -> str:
    return ", ".join(map(str, values[:-1])) + (" or " if len(values) > 1 else "") + str(values[-1])
