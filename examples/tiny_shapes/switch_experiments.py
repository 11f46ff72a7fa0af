"""Trains the embedded model to follow a new prompt, three seeds a setting, and prints how much of its gap is closed.

    python examples/tiny_shapes/switch_experiments.py --output_dir switches [--only NAME ...] [--jobs 4]

After a switch of the prompt the model fits the new one less than a new video of it does in the same block: that is the
gap, by kind of the switch (`KINDS`). Training has scenes that the model has seen in training; what is judged are
held-out ones, of the split `validation` for choosing settings, of `test` for reporting what they do. What is complete
is not repeated.
"""

import argparse
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from data import Draws, captions, draw_scenes, held_out
from experiments import MATCH, SHARED_PAST, STUDENT, start

from astrolabe_diffusers.cli.arguments import ArgumentParser
from astrolabe_diffusers.rewards.metrics.tiny_shapes_world import SHAPES
from astrolabe_diffusers.training import exit_code


def _any(count: int) -> Callable[[torch.Tensor, Draws], torch.Tensor]:
    return lambda after, draws: draw_scenes(len(after), draws, torch.full((len(after),), count))


def _other(column: int, change: Callable[[torch.Tensor, Draws], torch.Tensor]):
    """The scenes whose colours (0), shapes (1) or directions (2) are what `change` makes of them."""

    def before(after, draws):
        scenes = after.clone()
        scenes[:, column:-1:3] = change(after[:, column:-1:3], draws)
        return scenes

    return before


# Of scenes of three objects [N, 10], those before a switch to them.
KINDS: dict[str, Callable[[torch.Tensor, Draws], torch.Tensor]] = {
    "one to three": _any(1),
    "two to three": _any(2),
    "three to three": _any(3),
    "reversed": _other(2, lambda directions, draws: directions ^ 1),
    "other shapes": _other(1, lambda shapes, draws: (shapes + 1 + draws.below(3, *shapes.shape)) % len(SHAPES)),
    "colours in turn": _other(0, lambda colors, draws: colors.roll(1, dims=1)),
}
SPLITS = ("train", "validation", "test")
# With a pair of scenes the prompt changes after three blocks: the window has no room for more than is in it then.
PAIR = "{} [2.25s] | {}"
# Three blocks before the switch and three after it.
JUDGED = {"num_frames": 69, "switch_prompts": "scenes", "batch_size": 40, "num_prompts": 100_000, "num_videos": 0}
TRANSITIONS = ("roll", "recache")
WINDOW = {"window_size": 3, "sample_frames": 12, **SHARED_PAST}
SCENES = {**WINDOW, "prompts": "scenes", "switch_prompts": "scenes"}
EITHER = {**SCENES, "transitions": "roll,recache"}
SETTINGS: dict[str, dict] = {
    "first block": {"prompts": "captions"},
    "windows without a switch": {**WINDOW, "prompts": "captions"},
    "roll or recache": EITHER,
    "roll or recache, pasts not shared": {**EITHER, "shared_past": False},
    "roll or recache, the second block too": {**EITHER, "switch_distances": "0,1"},
    "roll": {**SCENES, "transitions": "roll"},
    "recache": {**SCENES, "transitions": "recache"},
}


def write_prompts(folder: Path, num_train: int = 64, num_held_out: int = 40) -> None:
    """Writes `scenes`, pairs of captions of all kinds, as many of each, kind after kind; `captions`, the new ones
    alone; and `unchanged`, in which these go on as they are. The scenes of `train` are training's; of the others those
    after the switch are held out."""
    draws = Draws(torch.Generator().manual_seed(0), "cpu")
    pairs: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    for before in KINDS.values():
        after = _any(3)(torch.empty(12 * (num_train + 2 * num_held_out)), draws)
        scenes = before(after, draws)
        train, unseen = ~held_out(after) & ~held_out(scenes), held_out(after)
        trained, judged = (list(zip(captions(scenes[rows]), captions(after[rows]))) for rows in (train, unseen))
        pairs["train"] += trained[:num_train]
        pairs["validation"] += judged[:num_held_out]
        pairs["test"] += judged[num_held_out : 2 * num_held_out]
    for split, of_split in pairs.items():
        texts = {
            "scenes": [PAIR.format(old, new) for old, new in of_split],
            "captions": [new for _, new in of_split],
            "unchanged": [PAIR.format(new, new) for _, new in of_split],
        }
        for name, lines in texts.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / f"{split}.txt").write_text("\n".join(lines) + "\n")


def blocks_after(results: dict, transition: str, column: str) -> torch.Tensor:
    """Match with the new prompt [kinds, pairs, blocks] in the blocks after the switch."""
    entries = results["columns"][column]["after_switch"][transition][MATCH]["new"]
    return torch.tensor([entry["scores"] for entry in entries]).T.unflatten(0, (len(KINDS), -1))


@dataclass
class Judged:
    """Of one run, by transition, match [kinds, pairs, blocks] after the switch, of base and LoRA; and `new`, of new
    videos in the same blocks."""

    base: dict[str, torch.Tensor]
    lora: dict[str, torch.Tensor]

    @classmethod
    def read(cls, folder: Path) -> "Judged":
        switched, unchanged = (
            json.loads((folder / name / "results.json").read_text()) for name in ("scenes", "unchanged")
        )
        sides = []
        for column in ("base", "lora"):
            values = {transition: blocks_after(switched, transition, column) for transition in TRANSITIONS}
            sides.append(values | {"new": blocks_after(unchanged, "roll", column)})
        return cls(*sides)


def run(name: str, seed: int, output_dir: Path, split: str, number: int) -> Judged | None:
    """Trains and judges; `None` if one of both failed."""
    folder = (output_dir / f"{list(SETTINGS).index(name):02d}-{seed}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder.parent / "prompts"
    if not (folder / "results.json").is_file():
        settings = {"config": "tiny_shapes", "seed": seed, "output_dir": folder, "report_to": "none"}
        # It is judged below.
        settings |= {"eval_num_frames": 45, "num_eval_prompts": 2, "eval_seeds": 1, "num_eval_videos": 0}
        settings |= {"eval_rewards": "flicker", "eval_steps": 10_000, "checkpointing_steps": 10_000}
        settings |= SETTINGS[name]
        start("train_nft.py", settings | {"prompts": prompts / settings["prompts"]}, folder / "log.txt", number)
    for kind, transitions in (("scenes", TRANSITIONS), ("unchanged", ("roll",))):
        if (folder / "results.json").is_file() and not (folder / kind / "results.json").is_file():
            settings = {"column": f"lora={folder}", "prompts": prompts / kind, "eval_split": split, **JUDGED}
            settings |= {"transitions": ",".join(transitions), "rewards": f"{MATCH},hard_cut", "seeds": 1}
            start("evaluate.py", settings | {"output_dir": folder / kind}, folder / "log.txt", number)
    if all((folder / kind / "results.json").is_file() for kind in ("scenes", "unchanged")):
        return Judged.read(folder)
    return None


def main(argv: list[str] | None = None):
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("switches"))
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=(101, 102, 103), help="two to five")
    parser.add_argument("--eval_split", choices=SPLITS[1:], default="test")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    args = parser.parse_args(argv)
    if len(args.seeds) not in STUDENT:
        parser.error("--seeds: two to five, for an interval over seeds.")
    write_prompts(args.output_dir / "prompts")
    numbers = count()
    with ThreadPoolExecutor(args.jobs) as executor:
        futures = {
            name: [
                executor.submit(run, name, seed, args.output_dir, args.eval_split, next(numbers))
                for seed in args.seeds
            ]
            for name in args.only
        }
        judged = {name: [future.result() for future in of_name] for name, of_name in futures.items()}
    print_tables({name: runs for name, runs in judged.items() if None not in runs})
    for name in (name for name, runs in judged.items() if None in runs):
        print(f"{name}: {sum(run is not None for run in judged[name])} of {len(args.seeds)} runs")


def print_tables(judged: dict[str, list[Judged]]):
    """How much of the base's gap is closed in the first block after a switch, with its interval over seeds, Student's
    t, and over pairs, of the mean over the seeds; below, match block by block."""
    print(f"| gap closed, block 1 | | {' | '.join(['all', *KINDS])} |")
    print("|---" * (3 + len(KINDS)) + "|")
    for name, runs in judged.items():
        for transition in TRANSITIONS:
            base, new = (torch.stack([run.base[key] for run in runs])[..., 0] for key in (transition, "new"))
            lora = torch.stack([run.lora[transition] for run in runs])[..., 0]
            cells = [closed(*(values.flatten(1) for values in (base, new, lora)))]
            cells += [closed(*of_kind) for of_kind in zip(base.unbind(1), new.unbind(1), lora.unbind(1))]
            print(f"| {name} | {transition} | {' | '.join(cells)} |")
    for key in (*TRANSITIONS, "new"):
        print(f"\n| {key}, block 1 2 3 | {' | '.join(KINDS)} |")
        print("|---" * (1 + len(KINDS)) + "|")
        rows = {"base": next(iter(judged.values()))[0].base[key]}
        rows |= {name: torch.stack([run.lora[key] for run in runs]).mean(0) for name, runs in judged.items()}
        for name, values in rows.items():
            blocks = values.mean(1).tolist()
            print(f"| {name} | {' | '.join(' '.join(f'{value:.3f}' for value in row) for row in blocks)} |")


def closed(base: torch.Tensor, new: torch.Tensor, lora: torch.Tensor) -> str:
    """The share of the gap that is closed, of matches [seeds, pairs] of base, new video and LoRA, with half its 95 %
    intervals."""
    won, gap = lora - base, (new - base)[0]
    by_seed = won.mean(1) / gap.mean()
    share, (seeds, pairs) = by_seed.mean(), won.shape
    over_seeds = STUDENT[seeds] * by_seed.std() / seeds**0.5
    # Of a ratio of means: as of the mean of what is left of the numerator.
    over_pairs = 1.96 * (won.mean(0) - share * gap).std() / pairs**0.5 / gap.mean().abs()
    return f"{share:.2f} ±{over_seeds:.2f} seeds ±{over_pairs:.2f} pairs ({' '.join(f'{s:.2f}' for s in by_seed)})"


if __name__ == "__main__":
    sys.exit(exit_code(main))
