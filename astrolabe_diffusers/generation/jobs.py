"""Which videos are to be made, and in which batches."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import ClassVar

import torch

from ..errors import UserError
from ..rollout.prompts import Prompt
from ..rollout.seeds import seeded_generator


# What is far beyond is a slip, and would fill the memory with its list.
MAX_JOBS = 1_000_000


@dataclass(frozen=True)
class VideoJob:
    """One video to make: number `video_number` of prompt number `prompt_index`, both counted from 0."""

    prompt: Prompt
    prompt_index: int
    video_number: int
    num_frames: int

    FILE: ClassVar[str] = r"\d{5,}-\d+-.*\.mp4"  # the names below

    @property
    def file(self) -> str:
        """Its name in the output folder: both numbers and the beginning of the prompt."""
        slug = re.sub(r"\W+", "-", self.prompt.text.lower())[:40].strip("-")
        return f"{self.prompt_index:05d}-{self.video_number}-{slug}.mp4"

    def generator(self, seed: int) -> torch.Generator:
        """The source of all its random numbers, on the CPU: they depend on no other job and on no device."""
        return seeded_generator("video", seed, self.prompt_index, self.video_number)


def make_jobs(prompts: Sequence[Prompt], num_frames: Sequence[int], num_videos_per_prompt: int) -> list[VideoJob]:
    """All videos of a run, prompt after prompt; `num_frames` of each prompt's videos. At most `MAX_JOBS`."""
    if len(prompts) * num_videos_per_prompt > MAX_JOBS:
        raise UserError(
            f"{len(prompts)} prompts x num_videos_per_prompt={num_videos_per_prompt} are more than {MAX_JOBS} videos: "
            "split the prompts over several folders."
        )
    return [
        VideoJob(prompt, index, number, length)
        for index, (prompt, length) in enumerate(zip(prompts, num_frames))
        for number in range(num_videos_per_prompt)
    ]


def batches(jobs: Sequence[VideoJob], batch_size: int) -> Iterator[list[VideoJob]]:
    """Batches of at most `batch_size` jobs with equal numbers of frames, the shortest first."""
    length = attrgetter("num_frames")
    for _, group in groupby(sorted(jobs, key=length), key=length):
        equal = list(group)
        yield from (equal[start : start + batch_size] for start in range(0, len(equal), batch_size))
