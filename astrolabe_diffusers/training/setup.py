"""What a run is made of, from its settings: prompts, pipeline, rewards, optimizer."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler

from ..pipelines.pipeline_causal_wan import CausalWanPipeline
from ..rewards import RewardSet
from .config import PRECISIONS, NFTConfig
from .errors import LOADING, UserError, as_user_error
from .prompts import Prompt, PromptSource, train_and_eval_prompts
from .trackers import tracker_names


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


def accelerate_settings() -> AbstractContextManager:
    """What accelerate finds wrong inside with its own settings, which come from its launcher, is told in one line."""
    return as_user_error("accelerate's settings, in its configuration file or the environment")


def check_precision(accelerator: Accelerator):
    """accelerate takes a word that it does not know for "no", and its fp16 would need a gradient scaler."""
    if accelerator.mixed_precision not in PRECISIONS:
        raise UserError(
            f"mixed_precision must be one of {', '.join(PRECISIONS)}, not {accelerator.mixed_precision}, as "
            "accelerate's configuration file or ACCELERATE_MIXED_PRECISION has it."
        )


def load_from(model: str, revision: str | None = None, **kwargs) -> CausalWanPipeline:
    """The pipeline of a folder or Hub repository; `kwargs` of `from_pretrained`.

    Raises:
        UserError: it is of another class, which is said before anything is downloaded, or cannot be loaded whole.
    """
    with no_loading_bars(), as_user_error(f"cannot load {model}", LOADING), no_missing_tensors():
        name = DiffusionPipeline.load_config(model, revision=revision)["_class_name"]
        if not issubclass(getattr(diffusers, name, object), CausalWanPipeline):
            raise UserError(
                f"{model} is a {name}, not a CausalWanPipeline: examples/convert_checkpoint.py makes one of the "
                "weights of a published model."
            )
        pipeline = DiffusionPipeline.from_pretrained(model, revision=revision, **kwargs)
        pipeline.check_components()
    return pipeline


@contextmanager
def no_missing_tensors() -> Iterator[None]:
    """Raises a `ValueError` if files of models that are loaded inside lack tensors. diffusers and transformers go on
    with random values, or none, and log it."""
    missing = []

    def take(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "newly initialized" not in text:
            return True
        # A list in Python, or a table.
        missing.extend(
            list_item or row for list_item, row in re.findall(r"'([\w.]+)'|^(\S+) +\|.*MISSING", text, re.M)
        )
        return False

    loggers = [logging.getLogger(name) for name in ("diffusers.models.modeling_utils", "transformers.modeling_utils")]
    for logger in loggers:
        logger.addFilter(take)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(take)
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing in its files: {', '.join(sorted(missing)[:3])}")


@contextmanager
def no_loading_bars() -> Iterator[None]:
    """Loading takes its time in silence: the bars would stand before an error's one line, and in every log file. Those
    of downloads stay."""
    loggers = (diffusers.utils.logging, transformers.utils.logging)
    enabled = [library.is_progress_bar_enabled() for library in loggers]
    for library in loggers:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, was_enabled in zip(loggers, enabled):
            if was_enabled:
                library.enable_progress_bar()


def frame_rate(model: str, revision: str | None = None) -> float:
    """Frames a second of the videos of a folder's or Hub repository's pipeline, which is not loaded for that."""
    default = inspect.signature(CausalWanPipeline).parameters["frame_rate"].default
    with as_user_error(f"cannot load {model}"):
        return DiffusionPipeline.load_config(model, revision=revision).get("frame_rate", default)


def prompt_path(model: str, prompts: str | None) -> str:
    """The given prompts, or those that lie beside the model."""
    if prompts is not None:
        return prompts
    path = Path(model) / "prompts"
    if not path.is_dir():
        raise UserError(f"there is no folder {path}: check the model's name, or give prompts, a file or a folder.")
    return str(path)


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


def load_pipeline(
    model: str, accelerator: Accelerator, revision: str | None = None, variant: str | None = None
) -> DiffusionPipeline:
    """The frozen pipeline of a folder or the Hub on its device; in bf16 runs all of it is bf16 but the autoencoder."""
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    pipeline = load_from(model, revision, variant=variant, dtype={"default": dtype, "vae": torch.float32})
    return freeze_pipeline(pipeline, accelerator)


def freeze_pipeline(pipeline: DiffusionPipeline, accelerator: Accelerator) -> DiffusionPipeline:
    pipeline.set_progress_bar_config(disable=True)
    for component in (pipeline.vae, pipeline.text_encoder, pipeline.transformer):
        component.requires_grad_(False).eval()
    return pipeline.to(accelerator.device)


def video_size(
    pipeline: DiffusionPipeline, height: int | None, width: int | None, num_frames: int | None
) -> dict[str, int]:
    """`height`, `width` and `num_frames`, checked by the pipeline and rounded to whole blocks; its own where not
    given."""
    given = {"height": height, "width": width, "num_frames": num_frames}
    size = {name: value or pipeline.config[name] for name, value in given.items()}
    with as_user_error("video size"):
        size["num_frames"] = pipeline.round_num_frames(size["num_frames"])
        pipeline.check_inputs(
            prompt="", prompt_embeds=None, output_type="latent", callback_on_step_end_tensor_inputs=[], **size
        )
    return size


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
