"""What a run tells: log files, tracker, curves, the line of an epoch, and the table at the end."""

import json
import math
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from ..config import Config
from ..files.text import to_json
from ..files.writing import replacing, writing
from ..shareable import shareable
from .charts import draw_curves
from .comparison import Evaluation, compare, comparison_table
from .trackers import log_distributions, log_numbers, log_video, start_trackers
from .videos import side_by_side


# Figures of an epoch that its line shows, of those that the algorithm has: how they are called there, and their form.
LINE = {"loss": ("loss", ".4f"), "grad_norm": ("grad", ".2g")}


class RunReport:
    """Everything a run says about itself, whatever its algorithm; only the main process writes.

    `metrics.jsonl` has a line an epoch, `eval.jsonl` one an evaluation with the score of every held-out video;
    `rewards.png` is drawn from both. Every process has all `evaluations` so far that may be compared.

    Args:
        identity: what the scores of evaluations are scores of, a digest by name: only those of one identity may be
            compared.
    """

    def __init__(self, config: Config, accelerator: Accelerator, identity: dict[str, str]):
        self.config, self.accelerator, self.output_dir = config, accelerator, Path(config.output_dir)
        self.identity = identity
        self.since = 0  # the step from which on the run has had this identity
        self.evaluations: list[Evaluation] = []
        self.curve: list[tuple[int, float]] = []  # (step, mean training reward) since then
        self.num_samples = 0  # that were trained on, by the logs: an epoch had another number with other settings

    def resume(self, step: int) -> list[str]:
        """Take up the evaluations of a run that goes on at `step`, if its last ones have this identity. Without any
        what has changed is returned, by its names as far as they are known."""
        found, changed, self.since = [], [], step
        if self.accelerator.is_main_process:
            for record in read_jsonl(self.output_dir / "eval.jsonl", step):
                identity = record.get("identity", {})
                changed = [name for name in identity if identity[name] != self.identity.get(name)]
                found = [*found, record] if identity == self.identity else []
            if found:
                self.since = min(step, found[-1]["since"])
        evaluations = [Evaluation.from_json(record) for record in found]
        self.evaluations, self.since, changed = broadcast_object_list([evaluations, self.since, changed])
        return changed

    def start(self, step: int | None):
        """Open the logs: anew, or where a run that is resumed, after [`~RunReport.resume`], had come to at `step`."""
        if self.accelerator.is_main_process:
            with replacing(self.output_dir / "config.yaml") as partial:
                self.config.save(partial)
            last_step = -1 if step is None else step
            epochs = cut_jsonl(self.output_dir / "metrics.jsonl", last_step)
            cut_jsonl(self.output_dir / "eval.jsonl", last_step)
            self.num_samples = sum(round(record["samples_per_second"] * record["seconds"]) for record in epochs)
            points = [(record["step"], record["reward"]) for record in epochs if record["step"] > self.since]
            self.curve = [(step, math.nan if reward is None else reward) for step, reward in points]
        start_trackers(
            self.accelerator,
            self.config.report_to,
            project=re.sub(r"\W+", "-", self.config.algorithm.lower()),
            settings={name: str(value) for name, value in shareable(self.config).items()},
            run_name=self.output_dir.resolve().name,
            folder=self.output_dir / self.config.logging_dir,
            resume=step is not None,
        )
        # disable=None: no bar in a log file, where it would be noise. The lines of the epochs are there in any case.
        self.progress = tqdm(
            total=self.config.max_train_steps,
            initial=step or 0,
            desc="steps",
            disable=None if self.accelerator.is_main_process else True,
        )

    def print(self, text: str):
        if self.accelerator.is_main_process:
            tqdm.write(text)
            sys.stdout.flush()

    def add_epoch(self, metrics: dict[str, float], distributions: dict[str, torch.Tensor], seconds_left: float):
        """Log an epoch: `metrics` of any algorithm (docs/logged_metrics.md), with `step`, `reward` and `seconds`;
        `distributions` are the scores `(N,)` of all samples by name, group after group."""
        step, group_size = metrics["step"], self.config.samples_per_prompt
        statistics = {name: score_statistics(scores, group_size) for name, scores in distributions.items()}
        # The mean of a score is one of its statistics.
        numbers = {tag(name): value for name, value in metrics.items() if name not in distributions}
        log_numbers(self.accelerator, numbers | tags("reward", statistics), step)
        if self.accelerator.is_main_process:
            self.curve.append((step, metrics["reward"]))
            self.num_samples += len(distributions["reward"])
            append_jsonl(self.output_dir / "metrics.jsonl", metrics | {"statistics": statistics})
            histograms = {f"reward/{name}": scores for name, scores in distributions.items()}
            log_distributions(self.accelerator, histograms, step)
        latest = self.evaluations[-1]
        shown = (f"{label} {metrics[name]:{form}}  " for name, (label, form) in LINE.items() if name in metrics)
        self.print(
            f"step {step}/{self.config.max_train_steps}  reward {metrics['reward']:.4f}  "
            f"held-out {latest.mean():.4f} ({latest.mean() - self.evaluations[0].mean():+.4f} at step {latest.step})  "
            f"{''.join(shown)}{metrics['seconds']:.1f} s/epoch  ETA {duration(seconds_left)}"
        )

    def add_evaluation(self, evaluation: Evaluation, videos: Sequence[torch.Tensor], frame_rate: int):
        """Log an evaluation, redraw the curves and show `videos` in the trackers."""
        self.evaluations.append(evaluation)
        statistics = {name: score_statistics(torch.tensor(scores)) for name, scores in evaluation.scores.items()}
        # Trackers only go forward: the policy of the beginning, judged anew in the midst of a run, is not for them.
        is_tracked = evaluation.step >= self.since
        if is_tracked:
            log_numbers(self.accelerator, tags("eval", statistics), evaluation.step)
        self.print(f"step {evaluation.step}: held-out reward {evaluation.mean():.4f}")
        if not self.accelerator.is_main_process:
            return
        record = evaluation.to_json() | {"identity": self.identity, "since": self.since}
        append_jsonl(self.output_dir / "eval.jsonl", record)
        if len(self.evaluations) > 1:
            curves = {"train": self.curve, "held-out": [(past.step, past.mean()) for past in self.evaluations]}
            with replacing(self.output_dir / "rewards.png") as partial:
                draw_curves(curves, partial, " + ".join(self.config.rewards))
        if videos and is_tracked:
            images = side_by_side(videos, columns=min(4, len(videos)))
            log_video(self.accelerator, "eval/videos", images, frame_rate, evaluation.step)

    def finish(self, results: dict[str, Any]):
        """Write results.json, with the changes of all scores, and print the table of before and after."""
        self.progress.close()
        after = self.evaluations[-1]
        results["scores"] = compare(self.evaluations[0], after)
        number, num_prompts = results["num_videos"], results["num_prompts"]
        with replacing(self.output_dir / "results.json") as partial:
            partial.write_text(to_json(results, indent=2))
        files = "\n".join(f"{name + ':':<20}{self.output_dir / file}" for name, file in results["files"].items())
        ways = f" x {len(self.config.transitions)} transitions" if self.config.transitions else ""
        self.print(
            f"\n{number} held-out videos ({num_prompts} prompts x {self.config.eval_seeds} seeds{ways}), "
            f"before and after {after.step} steps\n{comparison_table(results['scores'], self.config.rewards)}\n\n"
            f"training took {duration(results['train_seconds'])} without evaluations, "
            f"{results['samples_per_second']:.1f} samples/s; peak memory {results['peak_memory_gb']:.2f} GB a process"
            f"\n{files}"
        )


def duration(seconds: float) -> str:
    return tqdm.format_interval(round(seconds)).removeprefix("0")


def tag(name: str) -> str:
    """The name of a metric in the trackers, which sort by what is before the first slash."""
    return f"{'speed' if name.startswith(('seconds', 'samples_per_second')) else 'train'}/{name}"


def tags(group: str, statistics: dict[str, dict[str, float]]) -> dict[str, float]:
    """[`score_statistics`] by score as `group/score/statistic`."""
    return {f"{group}/{name}/{key}": value for name, part in statistics.items() for key, value in part.items()}


def score_statistics(scores: torch.Tensor, group_size: int | None = None) -> dict[str, float]:
    """Mean, spread and ends of the finite scores of `(N,)`, and the mean of the spreads of groups if their size is
    given; nothing if none is finite. Spreads are standard deviations of the population."""
    values = scores[scores.isfinite()].double()
    if not len(values):
        return {}
    statistics = {"mean": values.mean(), "std": values.std(correction=0), "min": values.min(), "max": values.max()}
    if group_size:
        groups = [group[group.isfinite()].double() for group in scores.split(group_size)]
        statistics["group_std"] = torch.stack([group.std(correction=0) for group in groups if len(group)]).mean()
    return {name: value.item() for name, value in statistics.items()}


def append_jsonl(path: Path, record: dict):
    with writing(path), path.open("a") as file:
        file.write(to_json(record) + "\n")


def read_jsonl(path: Path, last_step: int) -> list[dict]:
    """Records up to `last_step`, none without a file."""
    records = []
    with suppress(FileNotFoundError, ValueError):  # a run was killed while it wrote the last line
        for line in path.read_text().splitlines():
            records.append(json.loads(line))
    return [record for record in records if record["step"] <= last_step]


def cut_jsonl(path: Path, last_step: int) -> list[dict]:
    """As [`read_jsonl`]. Later ones, of a run that is resumed from there or replaced, are cut off the file."""
    records = read_jsonl(path, last_step)
    if path.is_file():
        with replacing(path) as partial:
            partial.write_text("".join(to_json(record) + "\n" for record in records))
    return records
