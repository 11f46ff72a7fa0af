"""Prompt files, and which prompts, samples and batches make up an epoch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from .errors import UserError
from .seeds import seeded_generator


T = TypeVar("T")
SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True)
class Prompt:
    """A prompt and whatever else its line of a JSONL file says."""

    text: str
    metadata: dict[str, Any] | None = None


@dataclass(frozen=True)
class Sample:
    """One video to make. `key` seeds all its random numbers; samples of one `group` share the prompt."""

    prompt: Prompt
    group: int
    key: tuple[int | str, ...]


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts of a `.txt` file, one a line, or a `.jsonl` file, objects with a `prompt`. Empty lines do not count."""
    path = Path(path)
    lines = [(number, line.strip()) for number, line in enumerate(path.read_text().splitlines(), 1)]
    lines = [(number, line) for number, line in lines if line]
    if path.suffix != ".jsonl":
        prompts = [Prompt(line) for _, line in lines]
    else:
        prompts = []
        for number, line in lines:
            try:
                metadata = json.loads(line)
                prompts.append(Prompt(metadata.pop("prompt"), metadata))
            except (ValueError, KeyError, AttributeError) as error:
                raise UserError(f'{path}, line {number}: not a JSON object with a "prompt".') from error
    if not prompts:
        raise UserError(f"the prompt file {path} is empty.")
    return prompts


def load_prompts(path: str | Path, num_eval_prompts: int) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts.

    Args:
        path: a folder with `train.txt` and `test.txt` (or `.jsonl`), or one file.
        num_eval_prompts:
            How many prompts are held out, evenly spaced: of the test file if there is one, else of the file itself.
    """
    path = Path(path)
    if path.is_dir():
        return read_split(path, "train"), spread(read_split(path, "test"), num_eval_prompts)
    prompts = read_split(path, "train")
    if len(prompts) <= num_eval_prompts:
        raise UserError(
            f"{path} has {len(prompts)} prompts, but num_eval_prompts={num_eval_prompts} of them are to be held out "
            "from training; lower it, or use a folder with train.txt and test.txt."
        )
    held_out = set(spread(range(len(prompts)), num_eval_prompts))
    train = [prompt for i, prompt in enumerate(prompts) if i not in held_out]
    return train, [prompts[i] for i in sorted(held_out)]


def read_split(path: str | Path, split: str) -> list[Prompt]:
    """Prompts of a file, or of `<split>.txt` (or `.jsonl`) in a folder."""
    path = Path(path)
    if path.is_dir():
        files = [path / f"{split}{suffix}" for suffix in SUFFIXES if (path / f"{split}{suffix}").is_file()]
        if not files:
            raise UserError(f"the prompt folder {path} has no {split}.txt and no {split}.jsonl.")
        return read_prompts(files[0])
    if not path.is_file():
        raise UserError(f"no prompt file or folder {path}.")
    if path.suffix not in SUFFIXES:
        raise UserError(f"the prompt file {path} must be a .txt or a .jsonl file.")
    return read_prompts(path)


def spread(items: Sequence[T], number: int) -> list[T]:
    """`number` items, or all if there are fewer, evenly spaced: a sorted file is covered from end to end."""
    number = min(number, len(items))
    return [items[i * len(items) // number] for i in range(number)]


def epoch_samples(prompts: Sequence[Prompt], num_groups: int, group_size: int, epoch: int, seed: int) -> list[Sample]:
    """All samples of an epoch, group after group; the same list whatever the number of processes.

    The prompts are passed through again and again, each time in a new order, `num_groups` an epoch.
    """
    samples = []
    for group in range(num_groups):
        cycle, position = divmod(epoch * num_groups + group, len(prompts))
        if group == 0 or position == 0:
            order = torch.randperm(len(prompts), generator=seeded_generator("prompts", seed, cycle)).tolist()
        prompt = prompts[order[position]]
        samples += [Sample(prompt, group, (seed, epoch, group, k)) for k in range(group_size)]
    return samples


def eval_samples(prompts: Sequence[Prompt], num_seeds: int) -> list[Sample]:
    """The held-out videos: every prompt with the first seed, then with the second ...; the same in every run."""
    return [Sample(prompt, i, ("held-out", i, s)) for s in range(num_seeds) for i, prompt in enumerate(prompts)]


def process_batches(items: Sequence[T], batch_size: int, process_index: int, num_processes: int) -> list[Sequence[T]]:
    """This process's part of every global batch, a global batch being `num_processes * batch_size` items in order.

    Any run of whole global batches thus holds the same samples whatever the number of processes.
    """
    stride = num_processes * batch_size
    starts = range(process_index * batch_size, len(items), stride)
    return [items[start : start + batch_size] for start in starts]
