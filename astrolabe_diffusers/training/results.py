"""What a run leaves: the best adapter so far, and at its end the last one with the comparison of before and after."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..distributed.agreement import is_first_process
from ..distributed.sharding import is_sharded, together
from ..files.text import read_json, to_json
from ..files.writing import replacing
from ..pipelines.loading import frame_configs
from ..reporting.comparison import Evaluation
from ..reporting.hub import push_to_hub
from ..reporting.machine import device_name, peak_memory_gb, versions
from ..reporting.model_card import write_card
from ..reporting.videos import write_columns
from ..rollout.samples import Sample
from .adapter_files import WEIGHT_NAMES, save_adapter
from .config import OnlineConfig
from .policies import CURRENT, POLICIES, use_policy


if TYPE_CHECKING:
    from .trainer import OnlineTrainer


class BestAdapter:
    """The adapter with the best held-out reward so far, kept in `<output_dir>/best/` for `load_lora_weights`.

    `best.json` beside it says its step and its reward, and the [`evaluation_identity`] of that.
    """

    def __init__(self, transformer: torch.nn.Module, config: OnlineConfig, identity: dict[str, str]):
        self.transformer, self.identity = transformer, identity
        self.policy = POLICIES[config.judged_policy]
        self.folder = Path(config.output_dir) / "best"
        self.record: dict[str, float] | None = None
        self.least = -math.inf  # that is to be surpassed where there is no record

    def resume(self, step: int, evaluations: Sequence[Evaluation]):
        """Takes up what a run has kept that goes on from `step` with the adapter that is loaded, and had these
        evaluations. What it kept later is another run's now, and what it kept for a reward of another identity is not
        to be compared: what is kept next has to be better than those evaluations, of which one may be this adapter's.
        """
        try:
            record = read_json(self.folder / "best.json")
            is_ours = record.pop("identity") == self.identity and record["step"] <= step
            self.record = record if is_ours else None
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            self.record = None
        if self.record is None:
            earlier = (evaluation.mean() for evaluation in evaluations if evaluation.step < step)
            self.least = max((reward for reward in earlier if not math.isnan(reward)), default=-math.inf)
            for evaluation in evaluations:
                if evaluation.step == step:
                    self.offer(evaluation)

    def offer(self, evaluation: Evaluation):
        """Keeps the adapter that was evaluated if it is the best one; every process calls it."""
        reward = evaluation.mean()
        best = self.least if self.record is None else self.record["reward"]
        # Not `<=`: one without a finite reward is none.
        if not reward > best:
            return
        self.record = {"step": evaluation.step, "reward": reward}
        with together():
            save_adapter(self.transformer, self.folder, self.policy, WEIGHT_NAMES[CURRENT])
            if is_first_process():
                with replacing(self.folder / "best.json") as partial:
                    partial.write_text(to_json(self.record | {"identity": self.identity}))


def evaluation_identity(trainer: "OnlineTrainer") -> dict[str, str]:
    """What the scores of an evaluation depend on beside the policy, as digests by name: a log that is shared names no
    place. Scores of another identity are not to be compared. Of a reward given in Python only the name is known."""
    config, pipeline = trainer.config, trainer.pipeline
    options = sorted((name, sorted(values.items())) for name, values in config.reward_options.items())
    identity = {
        "rewards": [sorted(config.rewards.items()), sorted(config.eval_rewards), options],
        "videos": [_described(sample) for sample in trainer.held_out.samples],
        "size": sorted(trainer.held_out.size.items()),
        "sampling": [frame_configs(pipeline), trainer.accelerator.mixed_precision, str(pipeline.vae.dtype)],
    }
    return {name: _digest(value) for name, value in identity.items()}


def _described(sample: Sample) -> Sequence:
    return sample.prompt.text, sample.prompt.metadata, sample.key, [asdict(scene) for scene in sample.scenes]


def _digest(value: Any) -> str:
    # A dataset may have objects beside its prompts. They count by their kind.
    text = json.dumps(value, default=lambda item: type(item).__name__, skipkeys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def write_results(trainer: "OnlineTrainer") -> dict[str, Any]:
    """What the main process writes at the end; it alone returns something."""
    config, accelerator = trainer.config, trainer.accelerator
    is_main, output_dir = accelerator.is_main_process, Path(config.output_dir)
    judged = config.judged_policy
    save_adapter(trainer.transformer, output_dir, POLICIES[judged], WEIGHT_NAMES[CURRENT])
    shown = trainer.held_out.shown
    # A sharded model generates on all processes or on none.
    if shown and (is_main or is_sharded()):
        before, after = (use_policy(trainer.transformer, policy) for policy in ("base", judged))
        columns = trainer.held_out.generate_columns({"before": before, "after": after})
    if not is_main:
        return {}
    # results.json names no folder of this machine.
    files = {"adapter": WEIGHT_NAMES[CURRENT], "curve": "rewards.png"}
    prompts = [sample.prompt.text for sample in shown]
    if shown:
        comparison = write_columns(columns, prompts, output_dir / "before_after", trainer.pipeline.config.frame_rate)
        kinds = ("before/after video", "before/after sheet", "before/after GIF")
        files |= {kind: Path(path).name for kind, path in zip(kinds, comparison)}
    files["model card"] = "README.md"
    num_samples = trainer.report.num_samples
    results = {
        "num_videos": len(trainer.held_out.samples),
        "num_prompts": len(trainer.eval_prompts),
        "size": trainer.held_out.size,
        "steps": trainer.step,
        "best": trainer.best.record,
        "num_samples": num_samples,
        "num_processes": accelerator.num_processes,
        "device": device_name(accelerator.device),
        "versions": versions(),
        "train_seconds": trainer.train_seconds,
        "samples_per_second": num_samples / trainer.train_seconds,
        "peak_memory_gb": peak_memory_gb(accelerator.device),
        "files": files,
    }
    trainer.report.finish(results)
    write_card(config, results, prompts, trainer.repo_id)
    if trainer.repo_id:
        trainer.report.print(push_to_hub(config, trainer.repo_id, results))
    return results
