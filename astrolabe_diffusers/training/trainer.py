"""The online trainer: prompts -> videos of a policy -> rewards -> advantages -> update, whatever the algorithm."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import set_seed

from ..distributed.agreement import Interruption, Resources, raise_together
from ..distributed.sharding import between_passes, is_sharded, shard, together
from ..errors import Interrupted, UserError, as_user_error
from ..evaluation.held_out import HeldOut, gather_videos, make_samples
from ..models.latent_frames import num_frames_of, num_latents_of
from ..pipelines.loading import QUANTIZED, frame_rate, freeze_pipeline, load_frozen_pipeline, video_size
from ..pipelines.pipeline_causal_wan import CausalWanPipeline
from ..reporting.hub import create_hub_repo
from ..reporting.machine import peak_memory_gb
from ..reporting.report import RunReport
from ..reporting.trackers import closing_trackers
from ..rollout.past import Past, make_windows
from ..rollout.prompt_embeds import COMPONENTS
from ..rollout.samples import Sample, VideoBatch, check_switch_prompts, epoch_samples, process_batches
from ..rollout.sampling import Rollout
from ..rollout.scoring import ScoringThread, gather_scores
from ..rollout.seeds import stable_seed
from .advantages import Advantages, group_advantages, reward_to_maximise
from .batch_size import check_auto, set_batch_size
from .build import (
    check_experts,
    check_pipeline,
    load_prompts,
    make_accelerator,
    make_rewards,
    name_rewards,
    set_recipe,
    store_prompt_embeds,
)
from .callbacks import TrainerCallback
from .checkpointing import CHECKPOINTING
from .checkpoints import Checkpoints, policy_identity, read_state
from .config import AUTO, OnlineConfig
from .down_sampling import trained_part
from .optimization import CollapseGuard, Optimization, make_optimizer, set_schedule
from .policies import (
    EMA,
    POLICIES,
    add_policies,
    ema_decay,
    exchanged,
    follow_current,
    leave_casts_to_autocast,
    load_policies,
    many_passes,
    policy_parameters,
    use_policy,
)
from .results import BestAdapter, evaluation_identity, write_results
from .run_folder import open_training_folder


class OnlineTrainer:
    """Trains a LoRA of a causal video pipeline by online reinforcement learning.

    Every process makes one trainer; [`~OnlineTrainer.train`] runs it. Mistakes of the user raise [`UserError`].

    An algorithm is a subclass. It has a `config_class`, says which policy samples, and defines
    [`~OnlineTrainer.accumulate_gradients`]; where it differs in them, its own [`~OnlineTrainer.advantages`],
    [`~OnlineTrainer.sample_values`], [`~OnlineTrainer.after_epoch`] and [`~OnlineTrainer.metrics`].

    Args:
        model: a [`CausalWanPipeline`], or folder or Hub id of one; that of the settings if not given.
        config: the settings.
        reward_funcs: in place of the settings' `rewards`, functions `fn(videos, prompts, metadata)` that return a
            score a video, names of rewards, and [`Reward`]s, or a single one. The weight of each is 1, or what
            `rewards` say of it.
        train_prompts, eval_prompts: a path, texts, dicts with a `prompt`, a `datasets.Dataset` or `DatasetDict`, in
            place of the settings' `prompts`. Without `eval_prompts` some of the training prompts are held out.
        callbacks: called at the stages of the run.
    """

    config_class: ClassVar[type[OnlineConfig]] = OnlineConfig
    # One of `POLICIES`; the videos of an epoch are its.
    sampling_policy: ClassVar[str] = "current"
    # Whether batches keep each block's noisy latents, as `batch.trajectory`.
    keep_trajectory: ClassVar[bool] = False

    def __init__(
        self,
        model: CausalWanPipeline | str | None = None,
        config: OnlineConfig | None = None,
        reward_funcs: Sequence | str | Callable | None = None,
        train_prompts: Iterable | str | Path | None = None,
        eval_prompts: Iterable | str | Path | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        config = config or self.config_class()
        if isinstance(model, (str, Path)):
            config, model = replace(config, model=str(model)), None
        self.config, self.named_rewards = name_rewards(config, reward_funcs)
        self.config.trainer = type(self)
        self.callbacks = list(callbacks)
        self.accelerator = make_accelerator(self.config)
        with Resources() as self.resources:
            with raise_together():
                if self.accelerator.is_main_process:
                    self.folder = self.resources.enter_context(open_training_folder(self.config))
            with raise_together():
                self.load(model, train_prompts, eval_prompts)
            with raise_together():
                if self.rollouts.prompt_embeds:
                    texts = (text for sample in self.held_out.samples for text in sample.texts)
                    self.rollouts.prompt_embeds.check(texts)
            self.prepare()
            self.resources = self.resources.pop_all()

    # What an algorithm is

    def advantages(self, scores: dict[str, torch.Tensor], samples: list[Sample]) -> Advantages:
        """Advantages of the N samples of all processes, of which a group may lie on several; group-relative ones.
        `scores` has by name `(N,)` `"reward"`, the weighted sum, each reward, and their parts."""
        config = self.config
        groups = torch.tensor([sample.group for sample in samples])
        primary = self.primary_reward if config.advantage_reward == "primary" else None
        size = config.reward_normalization_size or config.samples_per_prompt
        parts = torch.tensor([(s.group * config.samples_per_prompt + s.key[-1]) // size for s in samples])
        reward = reward_to_maximise(scores, config.rewards, parts, primary, config.reward_normalization)
        return group_advantages(reward, groups, config.advantage_std)

    def sample_values(self, scores: dict[str, torch.Tensor], advantages: Advantages) -> dict[str, torch.Tensor]:
        """What the update needs of every sample, by name `(N,)`, on every process the same."""
        return {"advantages": advantages.values * advantages.trained}

    def accumulate_gradients(
        self, batch: VideoBatch, values: dict[str, torch.Tensor], samples_per_step: int, synchronize: bool
    ) -> dict[str, torch.Tensor]:
        """Add the gradients of a batch, divided by `samples_per_step`, to the current policy's parameters.

        Args:
            values: the batch's part `(B,)` of [`~OnlineTrainer.sample_values`], on the batch's device.
            samples_per_step: of an optimizer step on this process.
            synchronize: whether it is the step's last batch, whose last backward pass averages over the processes;
                all others are inside [`~distributed.sharding.no_sync`].

        Returns:
            Sums over its samples of the values to be logged, among them `"loss"`.
        """
        raise NotImplementedError

    def compiles(self) -> bool:
        """Whether blocks are compiled, asked once everything is loaded: as `config.compile` says, and not if it says
        nothing. Nobody else knows whether the passes of an algorithm have equal shapes."""
        return bool(self.config.compile)

    def after_epoch(self, statistics: list[dict[str, float]]):
        """Once an epoch's steps are done, with what was logged of each."""

    def metrics(self) -> dict[str, float]:
        """Numbers of its own to be logged after an epoch."""
        return {}

    def make_state(self) -> dict[str, Any]:
        """Objects by name with `state_dict` and `load_state_dict`, JSON values, that checkpoints hold."""
        return {"guard": self.guard}

    # The run

    def load(
        self,
        pipeline: CausalWanPipeline | None,
        train_prompts: Iterable | str | Path | None,
        eval_prompts: Iterable | str | Path | None,
    ):
        """Everything that this process makes alone: it exchanges nothing with others."""
        config = self.config
        check_auto(config, self.accelerator)
        self.num_groups = config.groups_per_epoch(self.accelerator.num_processes)
        torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
        set_seed(config.seed)
        if pipeline is not None:
            check_pipeline(pipeline, config)

        self.prompts, self.eval_prompts = load_prompts(config, train_prompts, eval_prompts)
        if config.transitions:
            check_switch_prompts(self.prompts, config.switch_prompts, "training")
        # Before the large model is loaded: a wrong name is found at once.
        fps = pipeline.config.frame_rate if pipeline else frame_rate(config.model, config.revision)
        rewards, watched = make_rewards(config, fps, self.accelerator.process_index, self.named_rewards)
        for reward_set in filter(None, (rewards, watched)):
            self.resources.enter_context(reward_set)
        prompt_embeds = None
        if pipeline is None:
            source = config.model, self.accelerator, config.revision, config.variant
            without = dict.fromkeys(COMPONENTS) if config.prompt_embeds_dir else {}
            self.pipeline = load_frozen_pipeline(*source, config.vae_dtype, to_shard=is_sharded(), **without)
            if config.prompt_embeds_dir:
                prompt_embeds = store_prompt_embeds(config, self.accelerator, self.prompts, self.eval_prompts)
        else:
            self.pipeline = freeze_pipeline(pipeline, self.accelerator, to_shard=is_sharded())
            if config.vae_dtype:
                self.pipeline.vae.to(getattr(torch, config.vae_dtype))
        if any(getattr(expert, "is_quantized", False) for expert in self.pipeline.experts.values()):
            raise UserError(QUANTIZED)
        set_recipe(self.pipeline, config)
        check_experts(self.pipeline, config)
        skip_bad = config.nan_reward == "skip"
        scoring = ScoringThread(self.pipeline.vae, rewards, watched, skip_bad, config.reward_timeout)
        self.rewards = self.resources.enter_context(scoring)
        self.rollouts = Rollout(self.pipeline, self.rewards, prompt_embeds)
        self.size = video_size(self.pipeline, config.height, config.width, config.num_frames)
        size = video_size(self.pipeline, config.height, config.width, config.eval_num_frames or config.num_frames)
        samples = make_samples(self.eval_prompts, config.eval_seeds, config, self.pipeline, size)
        batches = config.train_batch_size, config.num_eval_videos
        self.held_out = HeldOut(self.rollouts, samples, size, *batches)
        self.transformer = self.pipeline.denoiser
        model, num_frames = self.transformer.config, num_latents_of(self.pipeline.vae, self.size["num_frames"])
        self.windows = make_windows(config, num_frames, model.num_frames_per_block, model.sink_size)
        with as_user_error(f"init_lora {config.init_lora}" if config.init_lora else "cannot add the LoRA"):
            if config.init_lora:
                load_policies(self.pipeline, config.init_lora, config.other_adapters, config.lora_components)
            else:
                size = config.rank, config.lora_alpha, config.lora_dropout
                which = config.lora_target_modules, config.other_adapters, config.lora_components
                add_policies(self.transformer, *size, *which)
        if config.gradient_checkpointing != "none":
            for expert in self.pipeline.experts.values():
                expert.enable_gradient_checkpointing(CHECKPOINTING[config.gradient_checkpointing])
        if config.train_batch_size != AUTO:  # or passes are not known yet
            self.compile_blocks()
        self.identity = policy_identity(self.transformer)

    def compile_blocks(self):
        self.compiled = self.compiles()
        if self.compiled:
            for expert in self.pipeline.experts.values():
                # Every policy has graphs of its own, in each kind of pass; after the first epoch all are there.
                expert.compile_repeated_blocks(fullgraph=True)

    def prepare(self):
        """What the processes share, and the state of the run."""
        config = self.config
        self.model = shard(self.transformer, self.accelerator) if is_sharded() else self.transformer
        self.optimizer, self.lr_scheduler = make_optimizer(config, policy_parameters(self.transformer))
        if not is_sharded():
            self.model, self.optimizer, self.lr_scheduler = self.accelerator.prepare(
                self.model, self.optimizer, self.lr_scheduler
            )
        if self.accelerator.mixed_precision != "no":
            leave_casts_to_autocast(self.transformer)
        self.checkpoints = Checkpoints(self.transformer, self.optimizer, config, self.identity)
        identity = evaluation_identity(self)
        self.best = BestAdapter(self.transformer, config, identity)
        self.report = RunReport(config, self.accelerator, identity)

        self.has_trained = False
        # Of the judged policy as the run began with it, where it is to be evaluated after a checkpoint is loaded.
        self.initial: list[torch.Tensor] = []
        self.epoch, self.step, self.train_seconds = 0, 0, 0.0
        self.guard = CollapseGuard(config.collapse_factor)
        self.stateful = self.make_state()
        self.interruption = Interruption()

    def train(self) -> dict[str, Any]:
        """Run to the end, once: then rewards, trackers and the folder are let go of. Returns what it wrote to
        results.json, where a NaN is null: the comparison of before and after, and files.

        Raises:
            Interrupted: SIGTERM or SIGINT came; there is a checkpoint of the last complete epoch.
            UserError: it has run before; or a mistake of the user.
        """
        if self.has_trained:
            raise UserError(
                'a trainer trains once: make another one, which with resume_from_checkpoint="latest" goes on from the '
                "last checkpoint."
            )
        self.has_trained = True
        with self.resources:
            self.resources.enter_context(closing_trackers(self.accelerator))
            self.start()
            try:
                with self.interruption:
                    self.train_epochs()
            except Interrupted as interruption:
                path = self.save_checkpoint()
                self.report.print(f"{interruption}: --resume_from_checkpoint latest goes on from {path}")
                self.end()
                raise
            with raise_together():
                results = write_results(self)
            for callback in self.callbacks:
                callback.on_train_end(self, results)
            self.end()
            return results

    def train_epochs(self):
        """The epochs that are left, and the evaluations and checkpoints that are due in between."""
        self.follow_up()
        while self.step < self.config.max_train_steps:
            started = time.perf_counter()
            # An epoch that is done anew, after an interruption or a kill, has the same random numbers.
            set_seed(stable_seed("epoch", self.config.seed, self.epoch) % 2**31, device_specific=True)
            groups = self.num_groups, self.config.samples_per_prompt
            switch = self.windows.past(self.epoch).switch, self.config.switch_prompts
            samples = epoch_samples(self.prompts, *groups, self.epoch, self.config.seed, *switch)
            batches = self.rollout(samples)
            sampled = time.perf_counter()
            scores, scoring_seconds = gather_scores(batches, samples)
            scored = time.perf_counter()
            advantages = self.advantages(scores, samples)
            if not advantages.valid.any():
                raise UserError("no video of this epoch has a finite reward: nothing is left to train on.")
            values = self.sample_values(scores, advantages)
            statistics = self.update(batches, advantages, values)
            self.after_epoch(statistics)
            ended = time.perf_counter()

            self.epoch += 1
            self.train_seconds += ended - started
            self.completed = self.state()
            timing = {
                "seconds": ended - started,
                "seconds_sampling": sampled - started,
                "seconds_scoring": scoring_seconds,
                "seconds_waiting_for_scores": scored - sampled,
                "seconds_training": ended - scored,
                "samples_per_second": len(samples) / (ended - started),
            }
            with raise_together():
                self.log(scores, advantages, statistics, timing)
            self.follow_up()

    def follow_up(self):
        """The evaluation and the checkpoint that are due after an epoch, or before the first one."""
        if self.initial:
            parameters = policy_parameters(self.transformer, POLICIES[self.config.judged_policy])
            with exchanged(parameters, self.initial):
                self.evaluate(step=0)
            self.initial = []
        elif not self.report.evaluations:
            self.evaluate()
        # A run that was interrupted while it evaluated makes up for it when it is resumed.
        if self.is_due(self.config.eval_steps) and self.report.evaluations[-1].step != self.step:
            self.evaluate()
        if self.step and self.is_due(self.config.checkpointing_steps):
            self.save_checkpoint()

    def rollout(self, samples: list[Sample]) -> list[VideoBatch]:
        """This process's part of the epoch's videos, sampled from the sampling policy and being scored."""
        batches, past = [], self.windows.past(self.epoch)
        with together(), self.sampling(), many_passes(self.transformer):
            for batch in self.generate(self.split(samples), past):
                batches.append(batch)
                self.report.progress.set_postfix_str(f"sampled {len(batches)}/{self.config.batches_per_epoch}")
                with between_passes():
                    self.interruption.check()
        return batches

    def sampling(self) -> AbstractContextManager:
        """Inside, the transformer is the policy that samples the videos for training."""
        return use_policy(self.transformer, self.sampling_policy, self.config.merge_lora)

    def generate(self, batches: Iterable[Sequence[Sample]], past: Past) -> Iterator[VideoBatch]:
        """Videos of the active policy that end with a window which begins after `past`."""
        size = self.size | {"num_frames": num_frames_of(self.pipeline.vae, past.num_frames + self.windows.size)}
        return self.rollouts.generate(batches, size, past, keep_trajectory=self.keep_trajectory)

    @property
    def primary_reward(self) -> str:
        return self.config.primary_reward or next(iter(self.config.rewards))

    def update(
        self, batches: list[VideoBatch], advantages: Advantages, values: dict[str, torch.Tensor]
    ) -> list[dict[str, float]]:
        """The optimizer steps of an epoch, with [`~OnlineTrainer.sample_values`]; returns their statistics."""
        config, statistics = self.config, []
        prepared = self.accelerator, self.model, self.optimizer, self.lr_scheduler
        optimization = Optimization(*prepared, config.max_grad_norm, skip_bad=config.nan_loss == "skip")
        mine = zip(*map(self.split, [advantages.values, *values.values()]))
        parts = [
            trained_part(batch, of_batch, dict(zip(values, columns)), config)
            for batch, (of_batch, *columns) in zip(batches, mine)
        ]
        for first in range(0, len(parts), config.gradient_accumulation_steps):
            self.report.progress.set_postfix_str("training")
            # Until its first step an epoch may be given up; then it is brought to its end.
            before_batch = self.interruption.check_together if first == 0 else lambda: None
            step_parts = parts[first : first + config.gradient_accumulation_steps]
            statistics.append(
                optimization.step(step_parts, self.accumulate_gradients, self.guard, self.step + 1, before_batch)
            )
            self.step += 1
            if config.ema_decay is not None:
                follow_current(self.transformer, EMA, ema_decay(self.step - 1, config.ema_decay))
            if statistics[-1]["skipped_steps"]:
                self.report.print(f"step {self.step} is skipped: loss or gradient is no finite number (nan_loss=skip)")
            self.report.progress.update()
        return statistics

    def evaluate(self, step: int | None = None):
        """Score the current policy, or its average, on the held-out prompts; the best one is kept. It is that after
        `step`, if not this one."""
        step = self.step if step is None else step
        self.report.progress.set_postfix_str("evaluating")
        folder = Path(self.config.output_dir) / "eval_videos" / f"step-{step}"
        with use_policy(self.transformer, self.config.judged_policy), many_passes(self.transformer):
            evaluation, videos = self.held_out.evaluate(step, folder, self.after_evaluation_batch)
        videos = gather_videos(videos, self.accelerator.is_main_process)
        with raise_together():
            self.report.add_evaluation(evaluation, videos, self.pipeline.config.frame_rate)
        self.best.offer(evaluation)
        for callback in self.callbacks:
            callback.on_evaluate(self, evaluation)

    def after_evaluation_batch(self, done: int, total: int):
        self.report.progress.set_postfix_str(f"evaluated {done}/{total}")
        self.interruption.check()

    def split(self, items):
        """This process's batches of the epoch's samples, or of a tensor `(N,)` in their order."""
        return process_batches(
            items, self.config.train_batch_size, self.accelerator.process_index, self.accelerator.num_processes
        )

    def is_due(self, interval: int) -> bool:
        """Whether a multiple of `interval` steps, or the end, fell into the epoch that is over."""
        before = self.step - self.config.steps_per_epoch
        return self.step // interval > before // interval or self.step >= self.config.max_train_steps

    def start(self):
        """Resume if asked to, open the logs, and say what is about to happen."""
        config = self.config
        is_main = self.accelerator.is_main_process
        with raise_together():
            self.repo_id = create_hub_repo(config) if config.push_to_hub and is_main else None
            if is_main:
                if config.resume_from_checkpoint is None:
                    self.folder.remove_files()
                self.folder.begin()
        path, lines = self.checkpoints.find(config.resume_from_checkpoint)
        with raise_together():
            if is_main and config.resume_from_checkpoint and path is None and not config.overwrite_output_dir:
                self.folder.refuse_finished()
        if path is not None:
            lines += self.resume(path)
        if config.train_batch_size == AUTO:
            lines.append(set_batch_size(self, path))
            self.compile_blocks()
        self.completed = self.state()
        self.saved = path and path.resolve()
        if self.report.evaluations:
            self.best.resume(self.step, self.report.evaluations)
        self.report.start(None if path is None else self.step)

        if config.resume_from_checkpoint:
            lines.append(f"resuming from {path}" if path else "no checkpoint to resume from: starting anew")
        for line in lines:
            self.report.print(line)
        self.announce()

    def resume(self, path: Path) -> list[str]:
        """Goes on from a checkpoint; returns what there is to say about it, line by line."""
        with raise_together():
            step = read_state(path, self.identity)["step"]
        changed, lines = self.report.resume(step), []
        if step and not self.report.evaluations:
            judged = policy_parameters(self.transformer, POLICIES[self.config.judged_policy])
            self.initial = [parameter.detach().clone() for parameter in judged]
            reason = f"other {', '.join(changed)}" if changed else "nothing to compare with in eval.jsonl"
            lines = [f"{reason}: the policy that the run began with is evaluated anew, and best/ begins anew"]
        self.load_state(self.checkpoints.load(path, like=self.state()))
        return lines

    def announce(self):
        config = self.config
        if config.lr_warmup_steps > config.max_train_steps:
            self.report.print(
                f"lr_warmup_steps={config.lr_warmup_steps} is longer than the run: learning_rate will not be reached"
            )
        if self.step >= config.max_train_steps:
            self.report.print(
                f"all {config.max_train_steps} steps are done, only what the end writes is written again; a larger "
                "--max_train_steps goes on."
            )
        trainable = sum(parameter.numel() for parameter in policy_parameters(self.transformer))
        processes, size = self.accelerator.num_processes, self.size
        compiled = "compiled, which takes minutes of the first epoch" if self.compiled else "not compiled"
        self.report.print(
            f"{config.model}: {size['num_frames']} frames of {size['height']}x{size['width']}; LoRA of rank "
            f"{self.identity['rank']}, {trainable:,} parameters; blocks are {compiled}\n"
            f"{processes} process{'es' if processes > 1 else ''} on {self.accelerator.device.type}, mixed precision "
            f"{self.accelerator.mixed_precision}; {len(self.prompts)} prompts, {self.num_groups} x "
            f"{config.samples_per_prompt} samples an epoch, {config.max_train_steps} steps; "
            f"{len(self.held_out.samples)} held-out videos of {self.held_out.size['num_frames']} frames; output in "
            f"{config.output_dir}"
        )

    def log(
        self, scores: dict[str, torch.Tensor], advantages: Advantages, statistics: list[dict], timing: dict[str, float]
    ):
        """Metrics of an epoch: means over all samples and optimizer steps."""
        metrics = {"step": self.step, "epoch": self.epoch}
        metrics |= {name: values.nanmean().item() for name, values in scores.items()}
        metrics["group_std"] = advantages.group_std.mean().item()
        metrics["zero_spread_groups"] = advantages.zero_spread
        if not advantages.trained.any():
            self.report.print(
                f"step {self.step}: nothing was learnt, for the rewards of every group are equal: raise "
                "samples_per_prompt, or take rewards that tell the videos apart"
            )
        metrics["skipped_samples"] = int((~advantages.trained).sum())
        metrics |= {key: sum(s[key] for s in statistics) / len(statistics) for key in statistics[0]}
        metrics["skipped_steps"] = int(sum(s["skipped_steps"] for s in statistics))
        metrics |= self.metrics() | timing
        for part in ("sampling", "scoring", "training"):
            metrics[f"samples_per_second_{part}"] = len(scores["reward"]) / timing[f"seconds_{part}"]
        metrics["peak_memory_gb"] = peak_memory_gb(self.accelerator.device)
        for callback in self.callbacks:
            metrics |= callback.on_epoch_end(self, metrics) or {}
        # Counted in steps: epochs before a checkpoint may have had other numbers of them.
        steps_left = self.config.max_train_steps - self.step
        self.report.add_epoch(metrics, scores, seconds_left=steps_left * self.train_seconds / self.step)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors, JSON values."""
        counts = {"step": self.step, "epoch": self.epoch, "train_seconds": self.train_seconds}
        return counts | {name: item.state_dict() for name, item in self.stateful.items()}

    def load_state(self, state: dict[str, Any]):
        self.step, self.epoch, self.train_seconds = state["step"], state["epoch"], state["train_seconds"]
        for name, item in self.stateful.items():
            item.load_state_dict(state[name])
        # It has stepped with the optimizer, also where that was skipped.
        set_schedule(self.optimizer, self.lr_scheduler, self.step)

    def save_checkpoint(self) -> Path:
        """The state after the last complete epoch, unless it is saved already; returns its folder.

        In an epoch that has not taken an optimizer step yet, the tensors are still those.
        """
        path = self.checkpoints.path(self.completed["step"])
        if self.saved != path.resolve():
            self.checkpoints.save(self.completed["step"], self.completed)
            self.saved = path.resolve()
            for callback in self.callbacks:
                callback.on_checkpoint(self, path)
        return path

    def end(self):
        """Lets go of all that outlives an error, and leaves the process group."""
        self.resources.close()
        # DDP has to go first. Were it the last to hold the process group, it would free it without letting go of
        # Python's lock, which the group's own thread may be waiting for: a run would hang at its end now and then.
        self.model = None
        self.accelerator.free_memory()
        self.accelerator.end_training()
