"""What a run is made of, from its settings: prompts, pipeline, rewards, optimizer."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler

from ..distributed.accelerator import accelerate_settings, check_precision
from ..errors import UserError, as_user_error
from ..reporting.trackers import tracker_names
from ..rewards import RewardSet
from ..rollout.prompts import Prompt, PromptSource, prompt_path, train_and_eval_prompts
from .config import NFTConfig


def make_accelerator(config: NFTConfig) -> Accelerator:
    logging_dir = Path(config.output_dir) / config.logging_dir
    with accelerate_settings():
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            log_with=tracker_names(config.report_to) or None,
            project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=str(logging_dir)),
            # The schedule counts optimizer steps, whatever the number of processes.
            step_scheduler_with_optimizer=False,
        )
    check_precision(accelerator)
    return accelerator


def load_prompts(config: NFTConfig) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts of a run."""
    path = prompt_path(config.pretrained_model_name_or_path, config.prompts)
    source = PromptSource(path, config.prompts_data_dir, config.prompt_column)
    return train_and_eval_prompts(source, config.num_eval_prompts, config.train_split, config.eval_split)


def set_recipe(pipeline: DiffusionPipeline, config: NFTConfig):
    """What the settings say about how the model attends and samples; its own where they do not."""
    attention = {"local_attn_size": config.local_attn_size, "sink_size": config.sink_size}
    pipeline.transformer.register_to_config(**{name: value for name, value in attention.items() if value is not None})
    model = pipeline.transformer.config
    if model.local_attn_size != -1 and model.local_attn_size < model.sink_size + model.num_frames_per_block:
        raise UserError(
            f"local_attn_size={model.local_attn_size} has no room for the sink of {model.sink_size} and a block of "
            f"{model.num_frames_per_block} latent frames; -1 is no limit."
        )
    if config.sigmas:
        pipeline.register_to_config(sigmas=config.sigmas)
    if config.num_context_frames is not None:
        pipeline.register_to_config(num_context_frames=config.num_context_frames or None)
    if pipeline.config.num_context_frames:
        raise UserError(
            "this pipeline encodes its context anew for every block, which cannot be trained: set "
            "num_context_frames=0 for a cache that grows, and the sigmas that go with it."
        )


def make_rewards(config: NFTConfig, fps: float, process_index: int = 0) -> tuple[RewardSet, RewardSet | None]:
    """The rewards that are trained on, and those that are only watched, for videos of `fps` frames a second."""
    known = [*config.rewards, *config.eval_rewards]
    for field in ("reward_options", "reward_placement"):
        unknown = [name for name in getattr(config, field) if name not in known]
        if unknown:
            raise UserError(f"{field}: {unknown[0]!r} is none of the rewards of this run, {', '.join(known)}.")

    def reward_set(field: str, weights: dict[str, float]) -> RewardSet:
        options = {name: value for name, value in config.reward_options.items() if name in weights}
        placement = {name: value for name, value in config.reward_placement.items() if name in weights}
        with as_user_error(field):
            return RewardSet(weights, options, placement, config.reward_timeout, fps, process_index)

    rewards = reward_set("rewards", config.rewards)
    with ExitStack() as stack:
        stack.callback(rewards.close)  # unless the others can be made too
        watched = dict.fromkeys(config.eval_rewards, 1.0)
        watched = reward_set("eval_rewards", watched) if watched else None
        stack.pop_all()
    return rewards, watched


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


def set_schedule(optimizer, lr_scheduler, steps: int):
    """Brings the learning rate to where it is after `steps` optimizer steps, by the settings of this run.

    Args:
        optimizer, lr_scheduler: from [`make_optimizer`], prepared by accelerate or not; the schedule is a `LambdaLR`,
            as all of `get_scheduler` are.
    """
    schedule = getattr(lr_scheduler, "scheduler", lr_scheduler)
    rates = [base * factor(steps) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    place = {"last_epoch": steps, "_step_count": steps + 1, "_last_lr": rates}
    schedule.load_state_dict(schedule.state_dict() | place)
