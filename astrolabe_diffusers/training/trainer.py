"""The NFT trainer: prompts -> videos of the old policy -> rewards -> advantages -> update of the current policy."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

from ..distributed.agreement import Resources, raise_together
from ..distributed.interruption import Interruption
from ..distributed.sharding import is_sharded, shard
from ..errors import Interrupted, UserError, as_user_error
from ..evaluation.held_out import evaluate, gather_videos, generate_columns
from ..pipelines.loading import frame_rate, freeze_pipeline, load_frozen_pipeline, video_size
from ..pipelines.pipeline_causal_wan import CausalWanPipeline
from ..reporting.hub import create_hub_repo, push_to_hub
from ..reporting.machine import device_name, peak_memory_gb, versions
from ..reporting.model_card import write_card
from ..reporting.report import RunReport
from ..reporting.trackers import closing_trackers
from ..reporting.videos import write_columns
from ..rollout.samples import Sample, VideoBatch, epoch_samples, eval_samples, process_batches
from ..rollout.sampling import PromptEncoder, generate
from ..rollout.scoring import ScoringThread, gather_scores
from ..rollout.seeds import stable_seed
from .advantages import Advantages, group_advantages, reward_to_maximise
from .build import load_prompts, make_accelerator, make_optimizer, make_rewards, set_recipe, set_schedule
from .checkpoints import WEIGHT_NAMES, Checkpoints, policy_identity, save_adapter
from .config import NFTConfig
from .nft.gradient import CollapseGuard, noise_batch, optimizer_step, training_sigmas
from .nft.selective_kl import ReferenceSchedule, RiskController, kl_weights, rank_disagreement
from .policies import (
    CURRENT,
    EMA,
    OLD,
    POLICIES,
    REFERENCE,
    activate_current,
    add_policies,
    ema_decay,
    follow_current,
    load_policies,
    old_policy_decay,
    policy_parameters,
    use_policy,
)
from .run_folder import open_training_folder
from .windows import make_windows


class NFTTrainer:
    """Trains a LoRA of a causal video pipeline with NFT.

    Every process makes one trainer; [`~NFTTrainer.train`] runs it. Mistakes of the user raise [`UserError`].

    Args:
        config ([`NFTConfig`]): the settings.
        pipeline ([`CausalWanPipeline`], *optional*): to train, in place of the one that the settings name.
    """

    def __init__(self, config: NFTConfig, pipeline: CausalWanPipeline | None = None):
        self.config = config
        self.accelerator = make_accelerator(config)
        self.resources = Resources()
        with ExitStack() as stack:
            stack.push(self.resources)
            with raise_together():
                if self.accelerator.is_main_process:
                    self.folder = open_training_folder(config)
                    self.resources.callback(self.folder.close)
            with raise_together():
                self.load(pipeline)
            self.prepare()
            stack.pop_all()

    def load(self, pipeline: CausalWanPipeline | None):
        """Everything that this process makes alone: it exchanges nothing with others."""
        config = self.config
        self.num_groups = config.groups_per_epoch(self.accelerator.num_processes)
        torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
        set_seed(config.seed)

        self.prompts, self.eval_prompts = load_prompts(config)
        self.eval_samples = eval_samples(self.eval_prompts, config.eval_seeds)
        # Before the large model is loaded: a wrong name is found at once.
        model = config.pretrained_model_name_or_path
        fps = pipeline.config.frame_rate if pipeline else frame_rate(model, config.revision)
        rewards, watched = make_rewards(config, fps, self.accelerator.process_index)
        for reward_set in filter(None, (rewards, watched)):
            self.resources.callback(reward_set.close)
        if pipeline is None:
            self.pipeline = load_frozen_pipeline(model, self.accelerator, config.revision, config.variant)
        else:
            self.pipeline = freeze_pipeline(pipeline, self.accelerator)
        set_recipe(self.pipeline, config)
        self.rewards = ScoringThread(
            self.pipeline.vae, rewards, watched, skip_bad=config.nan_reward == "skip", timeout=config.reward_timeout
        )
        self.resources.callback(self.rewards.close)
        self.size = video_size(self.pipeline, config.height, config.width, config.num_frames)
        self.eval_size = video_size(
            self.pipeline, config.height, config.width, config.eval_num_frames or config.num_frames
        )
        transformer_config, scale = self.pipeline.transformer.config, self.pipeline.vae.config.scale_factor_temporal
        self.windows = make_windows(
            config,
            (self.size["num_frames"] - 1) // scale + 1,
            transformer_config.num_frames_per_block,
            transformer_config.sink_size,
        )
        self.encoder = PromptEncoder(self.pipeline)
        self.sigmas = training_sigmas(self.pipeline, config.train_timesteps)

        self.transformer = self.pipeline.transformer
        with as_user_error(f"init_lora {config.init_lora}" if config.init_lora else "cannot add the LoRA"):
            if config.init_lora:
                load_policies(self.pipeline, config.init_lora, config.other_adapters)
            else:
                add_policies(
                    self.transformer,
                    config.rank,
                    config.lora_alpha,
                    config.lora_dropout,
                    config.lora_target_modules,
                    config.other_adapters,
                )
        if config.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self.identity = policy_identity(self.transformer)

    def prepare(self):
        """What the processes share, and the state of the run."""
        config = self.config
        # DDP synchronises the parameters that are trainable when it wraps the model, and no others.
        activate_current(self.transformer)
        if is_sharded():
            self.model = shard(self.transformer, self.accelerator)
            self.optimizer, self.lr_scheduler = make_optimizer(config, policy_parameters(self.transformer))
        else:
            self.model, self.optimizer, self.lr_scheduler = self.accelerator.prepare(
                self.transformer, *make_optimizer(config, policy_parameters(self.transformer))
            )
        self.checkpoints = Checkpoints(self.accelerator, self.transformer, self.optimizer, config, self.identity)
        self.report = RunReport(config, self.accelerator)

        self.epoch = 0
        self.step = 0
        self.train_seconds = 0.0
        self.guard = CollapseGuard(config.collapse_factor)
        self.risk = RiskController(
            config.risk_ratio,
            config.risk_ratio_rate,
            config.risk_ratio_min,
            config.risk_ratio_max,
            config.risk_buffer_size,
            released=config.risk_rule == "released",
        )
        self.reference = ReferenceSchedule(
            config.reference_reset_kl,
            config.reference_reset_epochs,
            config.reference_reset_kl_step,
            config.reference_reset_kl_min,
            config.reference_reset_kl_max,
            config.reference_reset_early_epochs,
        )
        # What a checkpoint holds beside tensors, by name: objects with state_dict and load_state_dict, JSON values.
        self.stateful = {"guard": self.guard, "risk": self.risk, "reference": self.reference}
        self.interruption = Interruption()

    def train(self) -> dict[str, Any]:
        """Run to the end. Returns what it wrote to results.json: the comparison of before and after, and files.

        Raises:
            Interrupted: SIGTERM or SIGINT came; there is a checkpoint of the last complete epoch.
        """
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
            return self.finish()

    def train_epochs(self):
        """The epochs that are left, and the evaluations and checkpoints that are due in between."""
        self.follow_up()
        while self.step < self.config.max_train_steps:
            started = time.perf_counter()
            # An epoch that is done anew, after an interruption or a kill, has the same random numbers.
            set_seed(stable_seed("epoch", self.config.seed, self.epoch) % 2**31, device_specific=True)
            samples = epoch_samples(
                self.prompts, self.num_groups, self.config.samples_per_prompt, self.epoch, self.config.seed
            )
            batches = self.rollout(samples)
            sampled = time.perf_counter()
            scores, scoring_seconds = gather_scores(batches, samples)
            scored = time.perf_counter()
            advantages = self.advantages(scores, samples)
            kl_mask = self.kl_mask(scores, advantages.valid)
            statistics = self.update(batches, advantages, kl_mask)
            follow_current(self.transformer, OLD, self.old_policy_decay)
            kl = sum(s["kl"] for s in statistics) / len(statistics)
            if self.reference.step(kl):
                follow_current(self.transformer, REFERENCE, decay=0.0)
            ended = time.perf_counter()

            self.epoch += 1
            self.train_seconds += ended - started
            self.completed = self.state()
            with raise_together():
                self.log(
                    scores,
                    advantages,
                    kl_mask,
                    statistics,
                    seconds=ended - started,
                    seconds_sampling=sampled - started,
                    seconds_scoring=scoring_seconds,
                    seconds_waiting_for_scores=scored - sampled,
                    seconds_training=ended - scored,
                    samples_per_second=len(samples) / (ended - started),
                )
            self.follow_up()

    def follow_up(self):
        """The evaluation and the checkpoint that are due after an epoch, or before the first one."""
        evaluated = [evaluation.step for evaluation in self.report.evaluations]
        # A run that was interrupted while it evaluated makes up for it when it is resumed.
        if not evaluated or (self.is_due(self.config.eval_steps) and evaluated[-1] != self.step):
            self.evaluate()
        if self.step and self.is_due(self.config.checkpointing_steps):
            self.save_checkpoint()

    def rollout(self, samples: list[Sample]) -> list[VideoBatch]:
        """This process's part of the epoch's videos, sampled from the old policy and being scored."""
        batches, start = [], self.windows.start(self.epoch)
        scale = self.pipeline.vae.config.scale_factor_temporal
        size = self.size | {"num_frames": 1 + scale * (start + self.windows.size - 1)}
        with raise_together(), use_policy(self.transformer, "old"):
            for batch in generate(
                self.pipeline,
                self.encoder,
                self.rewards,
                self.split(samples),
                size,
                window_start=start,
                shared_past=self.config.shared_prefix,
            ):
                batches.append(batch)
                self.report.activity(f"sampled {len(batches)}/{self.config.batches_per_epoch}")
                self.interruption.check()
        return batches

    def advantages(self, scores: dict[str, torch.Tensor], samples: list[Sample]) -> Advantages:
        """Advantages of the samples of all processes: a group may lie on several."""
        config = self.config
        groups = torch.tensor([sample.group for sample in samples])
        primary = self.primary_reward if config.advantage_reward == "primary" else None
        reward = reward_to_maximise(scores, config.rewards, groups, primary, config.reward_normalization)
        advantages = group_advantages(reward, groups, config.advantage_std)
        if not advantages.valid.any():
            raise UserError("no video of this epoch has a finite reward: nothing is left to train on.")
        return advantages

    @property
    def primary_reward(self) -> str:
        return self.config.primary_reward or next(iter(self.config.rewards))

    def kl_mask(self, scores: dict[str, torch.Tensor], valid: torch.Tensor) -> torch.Tensor:
        """The samples `(N,)` that are held to the reference, bool."""
        if not self.config.selective_kl:
            return valid
        others = [scores[name][valid] for name in self.config.rewards if name != self.primary_reward]
        mask = torch.zeros_like(valid)
        mask[valid] = self.risk(rank_disagreement(scores[self.primary_reward][valid], others))
        return mask

    def update(
        self, batches: list[VideoBatch], advantages: Advantages, kl_mask: torch.Tensor
    ) -> list[dict[str, float]]:
        """The optimizer steps of an epoch; returns their statistics."""
        accumulation = self.config.gradient_accumulation_steps
        # Samples are in the order of global batches, each of them one batch of every process after the other.
        parts = {"selected": self.config.steps_per_epoch, "batch": len(kl_mask) // self.config.train_batch_size}
        kl_weight = kl_weights(kl_mask, parts[self.config.kl_average])
        # Processes must agree on the passes that they make.
        use_reference = kl_mask.unflatten(0, (len(batches), -1)).any(1).tolist()
        values, weights, kl_weight = map(self.split, (advantages.values, advantages.trained.float(), kl_weight))
        statistics = []
        for first in range(0, len(batches), accumulation):
            self.report.activity("training")
            # Until its first step an epoch may be given up; then it is brought to its end.
            before_batch = self.interruption.check_together if first == 0 else lambda: None
            noised = [
                noise_batch(
                    batches[i],
                    self.sigmas,
                    values[i],
                    weights[i],
                    kl_weight[i],
                    use_reference[i],
                    self.config.adv_clip_max,
                )
                for i in range(first, first + accumulation)
            ]
            statistics.append(
                optimizer_step(
                    self.accelerator,
                    self.model,
                    self.optimizer,
                    self.lr_scheduler,
                    noised,
                    self.config,
                    self.guard,
                    self.step + 1,
                    before_batch,
                )
            )
            self.step += 1
            if self.config.ema_decay is not None:
                follow_current(self.transformer, EMA, ema_decay(self.step - 1, self.config.ema_decay))
            if statistics[-1]["skipped_steps"]:
                self.report.print(f"step {self.step} is skipped: loss or gradient is no finite number (nan_loss=skip)")
            self.report.progress.update()
        return statistics

    def evaluate(self):
        """Score the current policy, or its average, on the held-out prompts."""
        self.report.activity("evaluating")
        folder = Path(self.config.output_dir) / "eval_videos" / f"step-{self.step}"
        with use_policy(self.transformer, self.config.judged_policy):
            evaluation, videos = evaluate(
                self.pipeline,
                self.encoder,
                self.rewards,
                self.eval_samples,
                self.eval_size,
                self.config.train_batch_size,
                self.step,
                self.accelerator.process_index,
                self.accelerator.num_processes,
                folder,
                self.config.num_eval_videos,
                self.after_evaluation_batch,
            )
        videos = gather_videos(videos, self.accelerator.is_main_process)
        with raise_together():
            self.report.add_evaluation(evaluation, videos, self.pipeline.config.frame_rate)

    def after_evaluation_batch(self, done: int, total: int):
        self.report.activity(f"evaluated {done}/{total}")
        self.interruption.check()

    def split(self, items):
        """This process's batches of the epoch's samples, or of a tensor `(N,)` in their order."""
        return process_batches(
            items, self.config.train_batch_size, self.accelerator.process_index, self.accelerator.num_processes
        )

    @property
    def old_policy_decay(self) -> float:
        return old_policy_decay(self.step, self.config.old_policy_decay_rate, self.config.old_policy_decay_max)

    def is_due(self, interval: int) -> bool:
        """Whether a multiple of `interval` steps, or the end, fell into the epoch that is over."""
        before = self.step - self.config.steps_per_epoch
        return self.step // interval > before // interval or self.step >= self.config.max_train_steps

    def start(self):
        """Resume if asked to, open the logs, and say what is about to happen."""
        config = self.config
        with raise_together():
            self.repo_id = create_hub_repo(config) if config.push_to_hub and self.accelerator.is_main_process else None
        with raise_together():
            if self.accelerator.is_main_process:
                if config.resume_from_checkpoint is None:
                    self.folder.remove_files()
                self.folder.begin()
        path, lines = self.checkpoints.find(config.resume_from_checkpoint)
        with raise_together():
            if self.accelerator.is_main_process and config.resume_from_checkpoint and path is None:
                if not config.overwrite_output_dir:
                    self.folder.refuse_finished()
        if path is not None:
            self.load_state(self.checkpoints.load(path, like=self.state()))
        self.completed = self.state()
        self.saved = path and path.resolve()
        self.report.start(None if path is None else self.step)

        for line in lines:
            self.report.print(line)
        if config.resume_from_checkpoint:
            self.report.print(f"resuming from {path}" if path else "no checkpoint to resume from: starting anew")
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
        processes = self.accelerator.num_processes
        self.report.print(
            f"{config.pretrained_model_name_or_path}: {self.size['num_frames']} frames of {self.size['height']}x"
            f"{self.size['width']}; LoRA of rank {self.transformer.peft_config[CURRENT].r}, {trainable:,} parameters\n"
            f"{processes} process{'es' if processes > 1 else ''} on {self.accelerator.device.type}, mixed precision "
            f"{self.accelerator.mixed_precision}; {len(self.prompts)} prompts, {self.num_groups} x "
            f"{config.samples_per_prompt} samples an epoch, {config.max_train_steps} steps; "
            f"{len(self.eval_samples)} held-out videos of {self.eval_size['num_frames']} frames; output in "
            f"{config.output_dir}"
        )

    def log(
        self,
        scores: dict[str, torch.Tensor],
        advantages: Advantages,
        kl_mask: torch.Tensor,
        statistics: list[dict[str, float]],
        **timing: float,
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
        metrics["kl_samples"] = kl_mask.float().mean().item()
        if self.config.selective_kl:
            metrics["risk_ratio"] = self.risk.ratio
        metrics["reference_age"] = self.reference.age
        if self.reference.max_kl is not None:
            metrics["reference_reset_kl"] = self.reference.max_kl
        metrics |= {key: sum(s[key] for s in statistics) / len(statistics) for key in statistics[0]}
        metrics["skipped_steps"] = int(sum(s["skipped_steps"] for s in statistics))
        metrics["old_policy_decay"] = self.old_policy_decay
        metrics |= timing
        for part in ("sampling", "scoring", "training"):
            metrics[f"samples_per_second_{part}"] = len(scores["reward"]) / timing[f"seconds_{part}"]
        metrics["peak_memory_gb"] = peak_memory_gb(self.accelerator.device)
        epochs_left = self.config.num_train_epochs - self.epoch
        self.report.add_epoch(metrics, scores, seconds_left=epochs_left * self.train_seconds / self.epoch)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors, JSON values."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "train_seconds": self.train_seconds,
            **{name: item.state_dict() for name, item in self.stateful.items()},
        }

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
        return path

    def finish(self) -> dict[str, Any]:
        """The adapter, the comparison of before and after, and the upload if asked for."""
        with raise_together():
            results = self.write_results()
        self.end()
        return results

    def end(self):
        """Lets go of all that outlives an error, and leaves the process group."""
        self.resources.close()
        # DDP has to go first. Were it the last to hold the process group, it would free it without letting go of
        # Python's lock, which the group's own thread may be waiting for: a run would hang at its end now and then.
        self.model = None
        self.accelerator.free_memory()
        self.accelerator.end_training()

    def write_results(self) -> dict[str, Any]:
        """What the main process writes at the end; it alone returns something."""
        results, is_main = {}, self.accelerator.is_main_process
        output_dir = Path(self.config.output_dir)
        judged = self.config.judged_policy
        save_adapter(self.transformer, output_dir, POLICIES[judged], WEIGHT_NAMES[CURRENT], write=is_main)
        shown = self.eval_samples[: self.config.num_eval_videos]
        # A sharded model generates on all processes or on none.
        if shown and (is_main or is_sharded()):
            policies = {"before": use_policy(self.transformer, "base"), "after": use_policy(self.transformer, judged)}
            columns = generate_columns(
                self.pipeline, policies, self.encoder, shown, self.eval_size, self.config.train_batch_size
            )
        if is_main:
            # results.json names no folder of this machine.
            files = {"adapter": WEIGHT_NAMES[CURRENT], "curve": "rewards.png"}
            prompts = [sample.prompt.text for sample in shown]
            if shown:
                comparison = write_columns(
                    columns, prompts, output_dir / "before_after", self.pipeline.config.frame_rate
                )
                names = (Path(path).name for path in comparison)
                files |= zip(("before/after video", "before/after sheet", "before/after GIF"), names)
            files["model card"] = "README.md"
            num_samples = self.epoch * self.num_groups * self.config.samples_per_prompt
            results = {
                "num_videos": len(self.eval_samples),
                "num_prompts": len(self.eval_prompts),
                "size": self.eval_size,
                "steps": self.step,
                "num_samples": num_samples,
                "num_processes": self.accelerator.num_processes,
                "device": device_name(self.accelerator.device),
                "versions": versions(),
                "train_seconds": self.train_seconds,
                "samples_per_second": num_samples / self.train_seconds,
                "peak_memory_gb": peak_memory_gb(self.accelerator.device),
                "files": files,
            }
            self.report.finish(results, len(self.eval_prompts))
            write_card(self.config, results, prompts, self.repo_id)
            if self.repo_id:
                self.report.print(push_to_hub(self.config, self.repo_id, results))
        return results
