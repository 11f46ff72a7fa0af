"""What a run is made of, from its settings: prompts, pipeline, rewards, optimizer."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler

from ..rewards import RewardSet
from .config import NFTConfig
from .errors import UserError, as_user_error


def make_accelerator(config: NFTConfig) -> Accelerator:
    logging_dir = Path(config.output_dir) / config.logging_dir
    return Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=str(logging_dir)),
        # The schedule counts optimizer steps, whatever the number of processes.
        step_scheduler_with_optimizer=False,
    )


def prompt_path(model: str, prompts: str | None) -> str | Path:
    """The given prompts, or those that lie beside the model."""
    if prompts is not None:
        return prompts
    path = Path(model) / "prompts"
    if not path.is_dir():
        raise UserError(f"there is no folder {path}: check the model's name, or give prompts, a file or a folder.")
    return path


def load_pipeline(
    model: str, accelerator: Accelerator, revision: str | None = None, variant: str | None = None
) -> DiffusionPipeline:
    """The frozen pipeline on its device; in bf16 runs all of it is bf16 but the autoencoder."""
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    with as_user_error(f"cannot load {model}"):
        pipeline = DiffusionPipeline.from_pretrained(
            model, revision=revision, variant=variant, dtype={"default": dtype, "vae": torch.float32}
        )
    pipeline.set_progress_bar_config(disable=True)
    for component in (pipeline.vae, pipeline.text_encoder, pipeline.transformer):
        component.requires_grad_(False).eval()
    return pipeline.to(accelerator.device)


def video_size(
    pipeline: DiffusionPipeline, height: int | None, width: int | None, num_frames: int | None
) -> dict[str, int]:
    """`height`, `width` and `num_frames`, checked by the pipeline; its own where not given."""
    given = {"height": height, "width": width, "num_frames": num_frames}
    size = {name: value or pipeline.config[name] for name, value in given.items()}
    with as_user_error("video size"):
        pipeline.check_inputs(
            prompt="", prompt_embeds=None, output_type="latent", callback_on_step_end_tensor_inputs=[], **size
        )
    return size


def make_rewards(config: NFTConfig) -> tuple[RewardSet, RewardSet | None]:
    """The rewards that are trained on, and those that are only watched."""
    known = [*config.rewards, *config.eval_rewards]
    for field in ("reward_options", "reward_placement"):
        unknown = [name for name in getattr(config, field) if name not in known]
        if unknown:
            raise UserError(f"{field}: {unknown[0]!r} is none of the rewards of this run, {', '.join(known)}.")

    def reward_set(field: str, weights: dict[str, float]) -> RewardSet:
        options = {name: value for name, value in config.reward_options.items() if name in weights}
        placement = {name: value for name, value in config.reward_placement.items() if name in weights}
        with as_user_error(field):
            return RewardSet(weights, options, placement, config.reward_timeout)

    rewards = reward_set("rewards", config.rewards)
    watched = dict.fromkeys(config.eval_rewards, 1.0)
    return rewards, reward_set("eval_rewards", watched) if watched else None


def make_optimizer(config: NFTConfig, parameters: list[torch.nn.Parameter]):
    """AdamW and its learning rate schedule."""
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )
    name = config.lr_scheduler
    if name == "constant" and config.lr_warmup_steps:
        name = "constant_with_warmup"
    with as_user_error("lr_scheduler"):
        schedule = get_scheduler(
            name, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=config.max_train_steps
        )
    return optimizer, schedule
