"""Which prompts, samples and batches make up an epoch."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from .past import Past
from .prompts import Prompt
from .seeds import seeded_generator


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
            order = _order(prompts, cycle, seed)
        prompt = prompts[order[position]]
        samples += [Sample(prompt, group, (seed, epoch, group, k)) for k in range(group_size)]
    return samples


def epoch_prompts(prompts: Sequence[Prompt], num_groups: int, num_epochs: int, seed: int) -> list[Prompt]:
    """The prompts of the first `num_epochs` of [`epoch_samples`], each once."""
    return [prompts[i] for i in _order(prompts, 0, seed)[: num_groups * num_epochs]]


def _order(prompts: Sequence[Prompt], cycle: int, seed: int) -> list[int]:
    return torch.randperm(len(prompts), generator=seeded_generator("prompts", seed, cycle)).tolist()


def eval_samples(prompts: Sequence[Prompt], num_seeds: int) -> list[Sample]:
    """The held-out videos: every prompt with the first seed, then with the second ...; the same in every run."""
    return [Sample(prompt, i, ("held-out", i, s)) for s in range(num_seeds) for i, prompt in enumerate(prompts)]


def process_batches(items: Sequence, batch_size: int, process_index: int, num_processes: int) -> list[Sequence]:
    """This process's part of every global batch, a global batch being `num_processes * batch_size` items in order.

    Any run of whole global batches thus holds the same samples whatever the number of processes.
    """
    stride = num_processes * batch_size
    starts = range(process_index * batch_size, len(items), stride)
    return [items[start : start + batch_size] for start in starts]


class Trajectory:
    """How the blocks of a batch of videos came about from their noise `(B, C, f, h, w)`, for algorithms that train the
    steps of the sampler."""

    def __init__(self, noise: torch.Tensor, block_frames: int):
        # Of each block the `(B, C, n, h, w)` before its first step, after it, ... and the clean ones at last.
        self.latents = [[block] for block in noise.split(block_frames, dim=2)]
        # Of each block those of its steps, 0 to 1000, numbers on the latents' device.
        self.timesteps: list[list[torch.Tensor]] = []

    def on_step_end(self, pipeline, step: int, timestep: torch.Tensor, arguments: dict[str, torch.Tensor]) -> dict:
        """The pipeline's `callback_on_step_end`."""
        if step == 0:
            self.timesteps.append([])
        self.timesteps[-1].append(timestep)
        self.latents[len(self.timesteps) - 1].append(arguments["latents"])
        return {}


@dataclass
class VideoBatch:
    """Sampled videos: `latents` `(B, C, f, h, w)` float32, `prompt_embeds` `(B, L, D)`, a future of [`Scores`].

    Of the latents those after `past` are scored and trained. `trajectory` is there if it was to be kept.
    """

    samples: Sequence[Sample]
    prompt_embeds: torch.Tensor
    latents: torch.Tensor
    scores: Future = field(repr=False)
    past: Past = Past()
    trajectory: Trajectory | None = field(default=None, repr=False)
