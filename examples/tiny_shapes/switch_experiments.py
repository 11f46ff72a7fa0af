"""Trains the embedded model to follow a new prompt, three seeds a setting, and prints how much of its gap is closed.

    python examples/tiny_shapes/switch_experiments.py --output_dir switches [--only NAME ...] [--jobs 4]

After a switch of the prompt the model fits the new one less than a new video of it does in the same block: that is the
gap, by kind of the switch (`KINDS`). Training has scenes that the model has seen in training; what is judged are
held-out ones, of the split `validation` for choosing settings, of `test` for reporting what they do. What is complete
is not repeated.
"""

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from data import Draws, captions, draw_scenes, held_out
from experiments import MATCH, SHARED_PAST, SIXTY_FOUR, STUDENT, parse, start, submit

from astrolabe_diffusers import TINY_SHAPES
from astrolabe_diffusers.rewards.metrics.tiny_shapes_world import SHAPES
from astrolabe_diffusers.rollout.prompts import spread
from astrolabe_diffusers.training import exit_code


def _any(count: int) -> Callable[[torch.Tensor, Draws], torch.Tensor]:
    """Any scenes of `count` objects."""
    return lambda after, draws: draw_scenes(len(after), draws, torch.full((len(after),), count))


def _reversed(after: torch.Tensor, draws: Draws) -> torch.Tensor:
    """All objects moved the other way."""
    return _with_objects(after, 2, lambda directions: directions ^ 1)


def _other_shapes(after: torch.Tensor, draws: Draws) -> torch.Tensor:
    """All objects had other shapes."""
    return _with_objects(after, 1, lambda shapes: (shapes + 1 + draws.below(3, *shapes.shape)) % len(SHAPES))


def _colours_in_turn(after: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Each object had the colour of the one before it."""
    return _with_objects(after, 0, lambda colors: colors.roll(1, dims=1))


def _with_objects(after: torch.Tensor, column: int, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The scenes with other colours (0), shapes (1) or directions (2) of their objects."""
    columns = torch.arange(column, 3 * int((after[0, :-1:3] >= 0).sum()), 3)
    return after.index_copy(1, columns, change(after[:, columns]))


# Switches by the number of objects after them, and what makes the scenes [N, 10] before them of those after them. With
# the base each lacks .10 of a new video's match or more in the first block, whether by roll or by recache.
KINDS: dict[str, tuple[int, Callable[[torch.Tensor, Draws], torch.Tensor]]] = {
    "one to three": (3, _any(1)),
    "two to three": (3, _any(2)),
    "three to three": (3, _any(3)),
    "three reversed": (3, _reversed),
    "three, other shapes": (3, _other_shapes),
    "three, colours in turn": (3, _colours_in_turn),
    "two reversed": (2, _reversed),
    "two, other shapes": (2, _other_shapes),
    "two, colours in turn": (2, _colours_in_turn),
}
SPLITS = ("train", "validation", "test")
SINGLE = {"three objects": ".", "two objects": "two_objects", "one object": "one_object"}
# With a pair of scenes the prompt changes after three blocks: the window has no room for more than is in it then.
PAIR = "{} [2.25s] | {}"
TRANSITIONS = ("roll", "recache")
ALL = {"num_prompts": 100_000, "seeds": 1, "num_videos": 0, "rewards": MATCH}
# Three blocks before the switch and three after it.
AFTER = {**ALL, "switch_prompts": "scenes", "num_frames": 69, "batch_size": 54}
# By the folder of their prompts, what is evaluated of each run; a minute is 80 blocks.
EVALUATIONS: dict[str, dict] = {
    "scenes": {**AFTER, "transitions": ",".join(TRANSITIONS), "rewards": f"{MATCH},hard_cut"},
    "unchanged": {**AFTER, "transitions": "roll"},
    "single": {**ALL, "num_frames": 21, "seeds": 2, "batch_size": 53},
    "minute": {**AFTER, "transitions": "roll", "num_frames": 957, "batch_size": 8},
}
# As the recipe `tiny_shapes_switch` has it, of which "roll or recache, twice the KL" is the whole.
LONGER = {**SIXTY_FOUR, "learning_rate": 1e-3, "adam_epsilon": 1e-8, "max_train_steps": 120}
WINDOW = {**LONGER, "window_size": 3, "sample_frames": 12, **SHARED_PAST}
SCENES = {**WINDOW, "prompts": "scenes", "switch_prompts": "scenes"}
EITHER = {**SCENES, "transitions": "roll,recache"}
PLAIN_DESCENT = {"adam_epsilon": 1e-3}
SETTINGS: dict[str, dict] = {
    "first block": {**LONGER, "prompts": "captions"},
    "windows without a switch": {**WINDOW, "prompts": "captions"},
    "roll or recache": EITHER,
    "roll or recache, pasts not shared": {**EITHER, "shared_past": False},
    "roll or recache, twice the KL": {**EITHER, "kl_weight": 0.02},
    "roll": {**SCENES, "transitions": "roll"},
    "recache": {**SCENES, "transitions": "recache"},
    # The quick start's own steps, whose length is that of the gradients; then ones twice as long; then more of them.
    "plain descent": {**EITHER, **PLAIN_DESCENT, "learning_rate": 2.5e-2, "max_train_steps": 40},
    "plain descent, twice the rate": {
        **EITHER, **PLAIN_DESCENT, "learning_rate": 5e-2, "kl_weight": 0.005, "max_train_steps": 40
    },
    "plain descent, twice the rate, longer": {**EITHER, **PLAIN_DESCENT, "learning_rate": 5e-2, "kl_weight": 0.005},
}


def single_prompts(name: str, split: str) -> list[str]:
    return (Path(TINY_SHAPES) / "prompts" / SINGLE[name] / f"{split}.txt").read_text().splitlines()


def write_prompts(folder: Path, num_train: int = 64, num_held_out: int = 24) -> None:
    """Writes prompts of all kinds, as many of each, kind after kind. The scenes of `train` are training's; of the
    others those after the switch are held out.

    `scenes` are pairs, `captions` the new scenes alone, `unchanged` these as they go on in a new video. For a minute
    there are 16 of the pairs, that change in its middle, and what a new video does. `single` are the captions beside
    the model, of three objects, two and one.
    """
    draws = Draws(torch.Generator().manual_seed(0), "cpu")
    pairs: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    for num_objects, before in KINDS.values():
        after = draw_scenes(1200, draws, torch.full((1200,), num_objects))
        scenes = before(after, draws)
        train, unseen = ~held_out(after) & ~held_out(scenes), held_out(after)
        trained, judged = (list(zip(captions(scenes[rows]), captions(after[rows]))) for rows in (train, unseen))
        pairs["train"] += trained[:num_train]
        pairs["validation"] += judged[:num_held_out]
        pairs["test"] += judged[num_held_out : 2 * num_held_out]
    for split, of_split in pairs.items():
        few = spread(of_split, 16)
        texts = {
            "scenes": [PAIR.format(old, new) for old, new in of_split],
            "captions": [new for _, new in of_split],
            "unchanged": [PAIR.format(new, new) for _, new in of_split],
            "minute": [f"{old} [30s] | {new}" for old, new in few] + [f"{new} [0.75s] | {new}" for _, new in few],
            "single": [text for name in SINGLE for text in single_prompts(name, split)],
        }
        for name, lines in texts.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / f"{split}.txt").write_text("\n".join(lines) + "\n")


@dataclass
class Judged:
    """What was measured of a run's LoRA, or of the base, by [`EVALUATIONS`]."""

    after: dict[str, torch.Tensor]  # by transition, match [kinds, pairs, 3] in the blocks after the switch
    new: torch.Tensor  # the same of new videos in the same blocks
    cut: dict[str, torch.Tensor]  # by transition, `hard_cut` [kinds, pairs] of the first block after it
    single: torch.Tensor  # match [prompts], mean of their videos
    minute: torch.Tensor  # match [prompts, 79] of one prompt, without the first block
    late: torch.Tensor  # match [prompts, 40] after a roll in the middle of a minute

    @classmethod
    def read(cls, folder: Path, column: str) -> "Judged":
        results = {kind: json.loads((folder / kind / "results.json").read_text()) for kind in EVALUATIONS}
        columns = {kind: values["columns"][column] for kind, values in results.items()}

        def blocks(kind: str, transition: str = "roll", reward: str = MATCH) -> torch.Tensor:
            entries = columns[kind]["after_switch"][transition][reward]["new"]
            # A video that has no such block has null, which is NaN to NumPy.
            return torch.from_numpy(np.array([entry["scores"] for entry in entries], dtype=np.float32)).T

        def of_kinds(values: torch.Tensor) -> torch.Tensor:
            return values.unflatten(0, (len(KINDS), -1))

        return cls(
            after={transition: of_kinds(blocks("scenes", transition)) for transition in TRANSITIONS},
            new=of_kinds(blocks("unchanged")),
            cut={name: of_kinds(blocks("scenes", name, "hard_cut"))[..., 0] for name in TRANSITIONS},
            single=torch.tensor(columns["single"]["scores"][MATCH]).unflatten(0, (2, -1)).mean(0),
            minute=blocks("minute")[16:],
            late=blocks("minute")[:16, :40],
        )


def run(name: str, seed: int, output_dir: Path, split: str, number: int) -> dict[str, Judged] | None:
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
    for kind in EVALUATIONS:
        if (folder / "results.json").is_file() and not (folder / kind / "results.json").is_file():
            settings = {"column": f"lora={folder}", "prompts": prompts / kind, "eval_split": split}
            settings |= {**EVALUATIONS[kind], "output_dir": folder / kind}
            start("evaluate.py", settings, folder / "log.txt", number)
    if all((folder / kind / "results.json").is_file() for kind in EVALUATIONS):
        return {column: Judged.read(folder, column) for column in ("base", "lora")}
    return None


def main(argv: list[str] | None = None):
    args = parse(argv, __doc__, "switches", list(SETTINGS), (111, 112, 113))
    write_prompts(args.output_dir / "prompts")
    with ThreadPoolExecutor(args.jobs) as executor:
        futures = submit(executor, run, args)
        judged = {name: [future.result() for future in of_name] for name, of_name in futures.items()}
    if whole := {name: runs for name, runs in judged.items() if None not in runs}:
        print_tables(whole, args.eval_split)
    for name in judged.keys() - whole.keys():
        print(f"{name}: {sum(run is not None for run in judged[name])} of {len(args.seeds)} runs")


def print_tables(judged: dict[str, list[dict[str, Judged]]], split: str):
    """How much of the base's gap is closed in the first block after a switch; means of match and `hard_cut` after it,
    and over a minute; and changes with single prompts."""
    base = next(iter(judged.values()))[0]["base"]
    loras = {name: [run["lora"] for run in runs] for name, runs in judged.items()}
    rows = []
    for name, runs in loras.items():
        for transition in TRANSITIONS:
            gap = (base.new - base.after[transition])[..., 0]
            won = torch.stack([(run.after[transition] - base.after[transition])[..., 0] for run in runs])
            cells = [share(won.flatten(1), gap.flatten()), *map(share, won.unbind(1), gap)]
            rows.append([name, transition, *cells])
    table(["gap closed in the first block", "", "all", *KINDS], rows)

    def means(heading: list[str], of: Callable[[Judged], torch.Tensor]):
        """A row for the base and each name: the means over runs of what is [cells, numbers]."""
        everything = {"base": [base], **loras}
        values = {name: torch.stack([of(run) for run in runs]).mean(0).tolist() for name, runs in everything.items()}
        texts = {name: [" ".join(f"{x:.3f}" for x in cell) for cell in cells] for name, cells in values.items()}
        table(heading, [[name, *cells] for name, cells in texts.items()])

    for name in TRANSITIONS:
        means([f"{name}, blocks 1 2 3", *KINDS], lambda run, name=name: run.after[name].mean(1))
        means([f"hard_cut, {name}", *KINDS], lambda run, name=name: run.cut[name].mean(1, keepdim=True))
    means(["new video, the same blocks", *KINDS], lambda run: run.new.mean(1))
    means(["one prompt, by ten seconds", ""], lambda run: in_ten_seconds(run.minute))
    means(["after a roll at 30 s", ""], lambda run: in_ten_seconds(run.late))

    sizes = [len(single_prompts(name, split)) for name in SINGLE]
    rows = [["base", *(f"{part.mean():.3f}" for part in base.single.split(sizes))]]
    for name, runs in loras.items():
        changes = torch.stack([run.single - base.single for run in runs]).split(sizes, dim=1)
        rows.append([name, *map(share, changes, map(torch.ones, sizes))])
    table(["single prompts", *SINGLE], rows)


def in_ten_seconds(match: torch.Tensor) -> torch.Tensor:
    """Means [1, N] of match [prompts, blocks] in each ten seconds, 13 blocks."""
    return match.mean(0)[: match.shape[1] // 13 * 13].unflatten(0, (-1, 13)).mean(1)[None]


def table(heading: list[str], rows: list[list[str]]):
    print("\n".join(f"| {' | '.join(row)} |" for row in [heading, ["---"] * len(heading), *rows]) + "\n", flush=True)


def share(won: torch.Tensor, gap: torch.Tensor) -> str:
    """What was won, of [seeds, pairs], as a share of the gap [pairs], with half its 95 % intervals: over seeds,
    Student's t, and over pairs, of the mean over the seeds."""
    by_seed = won.mean(1) / gap.mean()
    mean, (seeds, pairs) = by_seed.mean(), won.shape
    over_seeds = STUDENT[seeds] * by_seed.std() / seeds**0.5
    # A ratio of means varies as the mean of what is left of its numerator.
    over_pairs = 1.96 * (won.mean(0) - mean * gap).std() / pairs**0.5 / gap.mean().abs()
    return f"{mean:+.3f} ±{over_seeds:.3f} ±{over_pairs:.3f} ({' '.join(f'{value:+.3f}' for value in by_seed)})"


if __name__ == "__main__":
    sys.exit(exit_code(main))
