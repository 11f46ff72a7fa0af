"""Which prompts, samples and batches make up an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from .prompts import Prompt
from .seeds import seeded_generator


T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """One video to make. `key` seeds all its random numbers; samples of one `group` share the prompt."""

    prompt: Prompt
    group: int
    key: tuple[int | str, ...]


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


@dataclass
class VideoBatch:
    """Sampled videos: `latents` `(B, C, f, h, w)` float32, `prompt_embeds` `(B, L, D)`, a future of [`Scores`].

    Of the latents those from `window_start` on are scored and trained; with `shared_past` the videos have those before
    in common.
    """

    samples: Sequence[Sample]
    prompt_embeds: torch.Tensor
    latents: torch.Tensor
    scores: Future = field(repr=False)
    window_start: int = 0
    shared_past: bool = False
