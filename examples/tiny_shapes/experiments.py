"""Compares settings of NFT on the embedded model, three seeds each, and prints a table.

    python examples/tiny_shapes/experiments.py --output_dir experiments [--only NAME ...] [--jobs 4]

Every run is one of examples/train_nft.py with `--config tiny_shapes`; those that are complete are not repeated. With
several GPUs the runs are dealt out over them.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import torch

from astrolabe_diffusers.cli.arguments import ArgumentParser
from astrolabe_diffusers.rewards.metrics.video_quality import luminance, relative_detail
from astrolabe_diffusers.training import exit_code


TRAIN = Path(__file__).parents[1] / "train_nft.py"
SEEDS = (42, 43, 44)
MATCH = "tiny_shapes_prompt_match"
DETAIL = "experiments:plain_detail"
HACKED = {"rewards": f"{DETAIL}=1,{MATCH}=0", "eval_rewards": "flicker", "learning_rate": 5e-4}
# The same beside the one that is meant.
TEMPTED = {**HACKED, "rewards": f"{DETAIL}=2,{MATCH}=1"}
TWO_BLOCKS = {"num_frames": 21}
LONG = {"eval_num_frames": 81, "num_eval_prompts": 31}
WINDOWS = {**LONG, "window_size": 3, "sample_frames": 9}
SHARED_PAST = {"shared_past": True, "train_batch_size": 8, "batches_per_epoch": 8}
UNIFORM = {"kl_weight": 0.03}
SELECTIVE = {**UNIFORM, "selective_kl": True}
MOVING = {**SELECTIVE, "reference_reset_kl": 0.15, "reference_reset_epochs": 15}
EXPERIMENTS: dict[str, dict] = {
    "NFT": {},
    "NFT, beta 0.1": {"beta": 0.1},
    # The loss is then adv_clip_max / beta = 5 times as large: the KL keeps its share with 5 times its weight.
    "adaptive loss weights": {"loss_weighting": "adaptive", "kl_weight": 0.15},
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


def plain_detail(videos, prompts, metadata):
    """A reward that invites to be hacked: `sharpness` without its factor for contrast. A frame that is plain but for
    the faintest noise has nearly 1."""
    return relative_detail(luminance(videos)).mean(1), {}


def run(name: str, seed: int, output_dir: Path, number: int) -> dict:
    """Scores of a run, the `number`th of all, as its results.json has them."""
    folder = output_dir / f"{list(EXPERIMENTS).index(name):02d}-{seed}"
    results = folder / "results.json"
    if not results.is_file():
        # Judged before and after, with no videos to look at.
        settings = {"seed": seed, "output_dir": folder, "eval_steps": 80, "num_eval_videos": 0, "report_to": "none"}
        settings |= {"checkpointing_steps": 1000, "eval_rewards": DETAIL} | EXPERIMENTS[name]
        command = [sys.executable, str(TRAIN), "--config", "tiny_shapes"]
        command += [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path}
        if gpus := torch.cuda.device_count():
            environment["CUDA_VISIBLE_DEVICES"] = str(number % gpus)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("w") as log:
            subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
    return json.loads(results.read_text())["scores"] if results.is_file() else {}


def cell(scores: list[dict], reward: str) -> str:
    """The mean change over the seeds with its 95 % interval over videos, and each seed's."""
    changes = [run[reward] for run in scores if reward in run]
    if not changes:
        return ""
    mean = sum(change["change"] for change in changes) / len(changes)
    half = sum(change["half_width_95"] ** 2 for change in changes) ** 0.5 / len(changes)
    return f"{mean:+.3f} +-{half:.3f} ({' '.join(format(change['change'], '+.3f') for change in changes)})"


def main(argv: list[str] | None = None):
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("experiments"))
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    args = parser.parse_args(argv)
    numbers = count()
    with ThreadPoolExecutor(args.jobs) as executor:
        futures = {
            name: [executor.submit(run, name, seed, args.output_dir, next(numbers)) for seed in SEEDS]
            for name in args.only
        }
        seeds = " ".join(map(str, SEEDS))
        print(f"| change after 80 steps, seeds {seeds} | prompt match | relative detail |\n|---|---|---|")
        for name, runs in futures.items():
            scores = [future.result() for future in runs]
            print(f"| {name} | {cell(scores, MATCH)} | {cell(scores, DETAIL)} |", flush=True)


if __name__ == "__main__":
    sys.exit(exit_code(main))
