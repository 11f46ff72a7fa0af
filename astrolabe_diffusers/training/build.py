"""What a run is made of, from its settings: processes, prompts, rewards, and the pipeline's recipe."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, ProjectConfiguration
from accelerate.utils.memory import clear_device_cache
from diffusers import DiffusionPipeline

from ..distributed.accelerator import accelerate_settings, check_precision
from ..distributed.sharding import check_sharding_settings, is_sharded
from ..errors import UserError, as_user_error
from ..layouts.experts import MEMORY_TRANSFORMER
from ..pipelines.loading import frozen_dtype, load_text_encoder
from ..pipelines.pipeline_causal_wan import CausalWanPipeline
from ..reporting.trackers import tracker_names
from ..rewards import Reward, RewardSet, named_reward_funcs
from ..rollout.past import Switch
from ..rollout.prompt_embeds import StoredPromptEmbeds, encoder_digest
from ..rollout.prompts import GivenPrompts, Prompt, PromptSource, hold_out, train_and_eval_prompts
from ..rollout.recipe import apply_recipe
from ..rollout.samples import epoch_prompts, epoch_samples, held_out_texts, warn_of_scenes
from .config import OnlineConfig


def make_accelerator(config: OnlineConfig) -> Accelerator:
    logging_dir = Path(config.output_dir) / config.logging_dir
    check_sharding_settings()
    with accelerate_settings():
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            log_with=tracker_names(config.report_to) or None,
            # Losses are divided by the number of samples: not by what the environment may say as well.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=str(logging_dir)),
            # The schedule counts optimizer steps, whatever the number of processes.
            step_scheduler_with_optimizer=False,
            # Nobody sees what most of the memory expert's last layer makes: its LoRA has no gradient.
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=MEMORY_TRANSFORMER in config.lora_components)
            ],
        )
    check_precision(accelerator)
    return accelerator


def load_prompts(
    config: OnlineConfig,
    train_prompts: Iterable | str | Path | None = None,
    eval_prompts: Iterable | str | Path | None = None,
) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts of a run: those given, or the settings'. What is given as a text or path is read
    as the setting `prompts` is."""

    def source_of(given: Iterable | str | Path, name: str) -> PromptSource | GivenPrompts:
        if isinstance(given, (str, Path)):
            return PromptSource(str(given), config.prompts_data_dir, config.prompt_column)
        return GivenPrompts(given, name, config.prompt_column)

    if train_prompts is None and eval_prompts is not None:
        raise UserError("eval_prompts go with train_prompts; the settings' `prompts` have both.")
    source = PromptSource.of(config) if train_prompts is None else source_of(train_prompts, "train_prompts")
    number, splits = config.num_eval_prompts, (config.train_split, config.eval_split)
    if eval_prompts is None:
        train, held_out = train_and_eval_prompts(source, number, *splits)
    else:
        held_out = source_of(eval_prompts, "eval_prompts").read(config.eval_split)
        train, held_out = hold_out(source.read(config.train_split), held_out, number, source.name)
    warn_of_scenes([*train, *held_out], config)
    return train, held_out


def store_prompt_embeds(
    config: OnlineConfig, accelerator: Accelerator, prompts: Sequence[Prompt], eval_prompts: Sequence[Prompt]
) -> StoredPromptEmbeds:
    """Those of the settings' model and folder, and in it those of this process's part of the texts that a run needs:
    all are there once every process has called it. The text encoder is loaded if one is missing, and let go of."""
    source = config.revision, config.variant
    with as_user_error("prompt_embeds_dir"):
        stored = StoredPromptEmbeds(
            config.prompt_embeds_dir, encoder_digest(config.model, frozen_dtype(accelerator), *source)
        )

    def load_encoder() -> Callable[[str], torch.Tensor]:
        return load_text_encoder(config.model, accelerator, *source).encode_prompt

    texts = run_texts(config, accelerator.num_processes, prompts, eval_prompts)
    stored.complete(texts[accelerator.process_index :: accelerator.num_processes], load_encoder)
    clear_device_cache(garbage_collection=True)
    return stored


def run_texts(
    config: OnlineConfig, num_processes: int, prompts: Sequence[Prompt], eval_prompts: Sequence[Prompt]
) -> list[str]:
    """The texts that a run needs embeddings of, each once."""
    groups, epochs, seed = config.groups_per_epoch(num_processes), config.num_train_epochs, config.seed
    if not config.transitions:
        used = [*eval_prompts, *epoch_prompts(prompts, groups, epochs, seed)]
        return list(dict.fromkeys(prompt.text for prompt in used))
    texts = held_out_texts(eval_prompts, config.switch_prompts)
    for epoch in range(epochs):
        for sample in epoch_samples(prompts, groups, 1, epoch, seed, Switch(), config.switch_prompts):
            texts += sample.texts
    return list(dict.fromkeys(texts))


def check_pipeline(pipeline: CausalWanPipeline, config: OnlineConfig):
    """A [`UserError`] if a pipeline that is given is not what a run can start from."""
    if not isinstance(pipeline, CausalWanPipeline):
        kind = type(pipeline).__name__
        raise UserError(f"model must be a CausalWanPipeline, or folder or Hub id of one, not a {kind}.")
    if config.prompt_embeds_dir:
        raise UserError(
            "prompt_embeds_dir knows a text encoder by its files: give the model as a folder or Hub id, and no "
            "pipeline."
        )
    with as_user_error("model"):
        pipeline.check_components()
        pipeline.check_text_encoder()
    loras = {name for expert in pipeline.experts.values() for name in getattr(expert, "peft_config", {})}
    if loras:
        raise UserError(
            f"the pipeline has LoRAs ({', '.join(sorted(loras))}): unload_lora_weights() first, after fuse_lora() if "
            "they are to stay; to go on from one use init_lora."
        )


def set_recipe(pipeline: DiffusionPipeline, config: OnlineConfig):
    """[`apply_recipe`], and a [`UserError`] if what comes of it cannot be trained."""
    apply_recipe(pipeline, config)
    if pipeline.config.num_context_frames:
        raise UserError(
            "this pipeline encodes its context anew for every block, which cannot be trained: set "
            "num_context_frames=0 for a cache that grows, and the sigmas that go with it."
        )


def check_experts(pipeline: DiffusionPipeline, config: OnlineConfig):
    """A [`UserError`] if the LoRA is to be on an expert that there is not, or two experts in shards."""
    for name in config.lora_components:
        if name not in pipeline.experts:
            raise UserError(f"lora_expert={config.lora_expert}: this model has no {name}; it can only be transformer.")
    if is_sharded() and pipeline.memory_transformer is not None:
        raise UserError("a model with a memory transformer cannot be trained in shards: choose DDP, which copies it.")


def name_rewards(
    config: OnlineConfig, reward_funcs: Sequence | str | Callable | Reward | None
) -> tuple[OnlineConfig, dict[str, Any]]:
    """The settings with the names of `reward_funcs` as rewards, and what is called so."""
    if reward_funcs is None:
        return config, {}
    with as_user_error("reward_funcs"):
        named = named_reward_funcs(reward_funcs)
    return replace(config, rewards={name: config.rewards.get(name, 1.0) for name in named}), named


def make_rewards(
    config: OnlineConfig, fps: float, process_index: int = 0, named: dict[str, Any] | None = None
) -> tuple[RewardSet, RewardSet | None]:
    """The rewards that are trained on, and those that are only watched; arguments as of `config.make_rewards`."""
    known = [*config.rewards, *config.eval_rewards]
    for field in ("reward_options", "reward_placement"):
        unknown = [name for name in getattr(config, field) if name not in known]
        if unknown:
            raise UserError(f"{field}: {unknown[0]!r} is none of the rewards of this run, {', '.join(known)}.")

    rewards, watched = config.make_rewards(config.rewards, fps, process_index, named, config.eval_rewards), None
    if config.eval_rewards:
        with ExitStack() as stack:
            stack.push(rewards)  # unless the others can be made too
            weights = dict.fromkeys(config.eval_rewards, 1.0)
            watched = config.make_rewards(weights, fps, process_index, others=config.rewards, field="eval_rewards")
            stack.pop_all()
    return rewards, watched
