"""Compares settings of reinforcement learning on the embedded model, three seeds each, and prints a table.

    python examples/tiny_shapes/experiments.py --output_dir experiments [--only NAME ...] [--seeds 1 2 3] [--jobs 4]

Every run is one of examples/train_nft.py with `--config tiny_shapes`, on captions of three objects, and an evaluation
of its adapter on those of two and one; what is complete is not repeated. With several GPUs the runs are dealt out over
them. `--eval_split validation` is for choosing settings, the default, `test`, for reporting what they do. Training for
switches of the prompt is in `switch_experiments.py`.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from statistics import mean, stdev

import torch

from astrolabe_diffusers import TINY_SHAPES
from astrolabe_diffusers.cli.arguments import ArgumentParser
from astrolabe_diffusers.rewards.metrics.video_quality import luminance, relative_detail
from astrolabe_diffusers.training import exit_code


EXAMPLES = Path(__file__).parents[1]
SEEDS = (42, 43, 44)
MATCH = "tiny_shapes_prompt_match"
DETAIL = "experiments:plain_detail"
EASIER = ("two_objects", "one_object")
# 97.5 % quantiles of Student's t, by the number of seeds.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}
# At the recipe's rate the videos collapse before the run ends.
HACKED = {"rewards": f"{DETAIL}=1,{MATCH}=0", "eval_rewards": "flicker", "learning_rate": 8e-3}
# The same beside the one that is meant.
TEMPTED = {"rewards": f"{DETAIL}=2,{MATCH}=1", "eval_rewards": "flicker"}
TWO_BLOCKS = {"num_frames": 21}
LONG = {"eval_num_frames": 81, "num_eval_prompts": 31}
WINDOWS = {**LONG, "window_size": 3, "sample_frames": 9}
# What the runs of docs/experiments.md have, and the recipe had. Its own steps cost about half.
SIXTY_FOUR = {"train_batch_size": 32, "batches_per_epoch": 2, "samples_per_prompt": 16, "trained_fraction": 1}
SIXTY_FOUR |= {"adam_epsilon": 1e-3, "kl_weight": 0.01}
SHARED_PAST = {"shared_past": True, "train_batch_size": 16, "batches_per_epoch": 4}
LAGGING = {"old_policy_decay_rate": 0.05, "old_policy_decay_max": 0.5}
UNIFORM = {"kl_weight": 0.03}
SELECTIVE = {**UNIFORM, "selective_kl": True}
MOVING = {**SELECTIVE, "reference_reset_kl": 0.15, "reference_reset_epochs": 15}
OF_SIXTY_FOUR: dict[str, dict] = {
    "NFT": {},
    # With the recipe's epsilon AdamW steps in proportion to the gradient. That of these losses is larger, by
    # 5 / sigma^2 and by 5 over the mean distance, or smaller, by beta: rates and KL weights make up for it.
    "AWM": {"algorithm": "awm", "learning_rate": 3.5e-3, "kl_weight": 0.05},
    # Its gradient is of the noise that was drawn, which has no structure: a twentieth as long as that of an error.
    "CM-GRPO": {"algorithm": "cm_grpo", "learning_rate": 0.12, "kl_weight": 0.015},
    "an old policy that lags": LAGGING,
    "an old policy that lags, beta 0.1": {**LAGGING, "beta": 0.1, "learning_rate": 0.25, "kl_weight": 0.001},
    "adaptive loss weights": {"loss_weighting": "adaptive", "learning_rate": 1.5e-3, "kl_weight": 0.17},
    "all noise levels": {"train_steps": [0, 1, 2, 3]},
    "AdamW with its usual epsilon": {"adam_epsilon": 1e-8, "learning_rate": 1e-3},
    "no KL": {"kl_weight": 0},
    "two blocks, clean context, the old policy's": TWO_BLOCKS,
    "two blocks, clean context, each policy's own": {**TWO_BLOCKS, "context_policy": "own"},
    "two blocks, noisy context": {**TWO_BLOCKS, "context": "noisy"},
    "long: one block trained": LONG,
    "long: windows of a longer video": WINDOWS,
    "long: windows, groups share their past": {**WINDOWS, **SHARED_PAST},
    "detail, no KL": {**HACKED, "kl_weight": 0},
    "detail, uniform KL": {**HACKED, **UNIFORM},
    "detail, selective KL": {**HACKED, **SELECTIVE},
    "both, no KL": {**TEMPTED, "kl_weight": 0},
    "both, uniform KL": {**TEMPTED, **UNIFORM},
    "both, selective KL": {**TEMPTED, **SELECTIVE},
    "both, selective KL, moving reference": {**TEMPTED, **MOVING},
}
EXPERIMENTS = {name: SIXTY_FOUR | settings for name, settings in OF_SIXTY_FOUR.items()} | {"the quick start": {}}


def plain_detail(videos, prompts, metadata):
    """A reward that invites to be hacked: `sharpness` without its factor for contrast. A frame that is plain but for
    the faintest noise has nearly 1."""
    return relative_detail(luminance(videos)).mean(1), {}


def start(script: str, settings: dict, log: Path, number: int) -> None:
    """Runs an example, the `number`th of all: with several GPUs, on one of them."""
    command = [sys.executable, str(EXAMPLES / script)]
    for key, value in settings.items():
        command += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    if gpus := torch.cuda.device_count():
        environment["CUDA_VISIBLE_DEVICES"] = str(number % gpus)
    with log.open("a") as file:
        subprocess.run(command, stdout=file, stderr=file, env=environment, check=False)


def run(name: str, seed: int, output_dir: Path, split: str, number: int) -> dict[str, float]:
    """Changes of a run, by what is measured; those of a failed one are missing."""
    folder = output_dir / f"{list(EXPERIMENTS).index(name):02d}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "results.json").is_file():
        # Judged before and after on two blocks, with no videos to look at.
        settings = {"config": "tiny_shapes", "seed": seed, "output_dir": folder, "eval_split": split}
        settings |= {"eval_num_frames": 21, "eval_steps": 10_000, "num_eval_videos": 0}
        settings |= {"checkpointing_steps": 10_000, "report_to": "none"}
        settings |= {"eval_rewards": DETAIL} | EXPERIMENTS[name]
        start("train_nft.py", settings, folder / "log.txt", number)
    changes = {}
    if (folder / "results.json").is_file():
        scores = json.loads((folder / "results.json").read_text())["scores"]
        changes = {reward: scores[reward]["change"] for reward in (MATCH, DETAIL) if reward in scores}
    for kind in EASIER:
        results = folder / kind / "results.json"
        if changes and not results.is_file():
            settings = {"column": f"lora={folder}", "prompts": Path(TINY_SHAPES) / "prompts" / kind, "rewards": MATCH}
            settings |= {"output_dir": folder / kind, "eval_split": split, "num_videos": 0}
            start("evaluate.py", settings, folder / "log.txt", number)
        if results.is_file():
            changes[kind] = json.loads(results.read_text())["columns"]["lora"]["change"][MATCH]["change"]
    return changes


def print_table(futures: dict[str, list], columns: dict[str, str], seeds: list[int]):
    """A row for each name, whose runs of all seeds return changes by the keys of `columns`."""
    print(f"| change, seeds {' '.join(map(str, seeds))} | {' | '.join(columns.values())} |")
    print("|---" * (1 + len(columns)) + "|")
    for name, runs in futures.items():
        changes = [future.result() for future in runs]
        cells = [cell([run[column] for run in changes if column in run], len(seeds)) for column in columns]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def cell(changes: list[float], number: int) -> str:
    """The mean change with its 95 % interval over the `number` of seeds (Student's t), and each seed's."""
    if len(changes) < number:
        return f"{len(changes)} of {number} runs"
    half = STUDENT[number] * stdev(changes) / len(changes) ** 0.5
    return f"{mean(changes):+.3f} ±{half:.3f} ({' '.join(format(change, '+.3f') for change in changes)})"


def parse(
    argv: list[str] | None, description: str, output_dir: str, names: list[str], seeds: tuple[int, ...]
) -> argparse.Namespace:
    parser = ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(output_dir))
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=seeds, help="two to six")
    parser.add_argument("--eval_split", choices=("validation", "test"), default="test")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    args = parser.parse_args(argv)
    if len(args.seeds) not in STUDENT:
        parser.error("--seeds: two to six, for an interval over seeds.")
    return args


def submit(executor: Executor, run: Callable, args: argparse.Namespace) -> dict[str, list[Future]]:
    """A run of each name with each seed."""
    numbers, about = count(), (args.output_dir, args.eval_split)
    return {
        name: [executor.submit(run, name, seed, *about, next(numbers)) for seed in args.seeds] for name in args.only
    }


def main(argv: list[str] | None = None):
    args = parse(argv, __doc__, "experiments", list(EXPERIMENTS), SEEDS)
    with ThreadPoolExecutor(args.jobs) as executor:
        futures = submit(executor, run, args)
        columns = {MATCH: "three objects", **{kind: kind.replace("_", " ") for kind in EASIER}, DETAIL: "detail"}
        print_table(futures, columns, args.seeds)


if __name__ == "__main__":
    sys.exit(exit_code(main))
