"""Which videos are to be made, and which are in the output folder: a line of JSON for every complete one."""

import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from filelock import FileLock

from ..errors import UserError
from ..files.output_folder import set_aside
from ..files.text import parse_json, to_json
from ..files.writing import PARTIAL, replacing, writing
from ..rollout.prompts import Prompt
from ..rollout.seeds import seeded_generator


# What is far beyond is a slip, and would fill the memory with its list.
MAX_JOBS = 1_000_000
# What every entry has. Those of other tools, which only the scoring of videos reads, may have the first two alone.
TYPES = {"file": str, "prompt": str, "prompt_index": int, "video_number": int, "bytes": int}


@dataclass(frozen=True)
class VideoJob:
    """One video to make: number `video_number` of prompt number `prompt_index`, both counted from 0."""

    prompt: Prompt
    prompt_index: int
    video_number: int
    num_frames: int

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


class Manifest:
    """
    `manifest.jsonl` of an output folder. Several processes may append to it at the same time.

    An entry has all that determines the video (prompt, seed, size, model, LoRAs, ...), `file` and its size in `bytes`,
    `seconds` (the time its batch took, divided by the videos of the batch), `frames_per_second` (frames by `seconds`),
    and with rewards `scores`, null where a part of one is no finite number, and their `reward_options`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / "manifest.jsonl"
        self._lock = folder / ".manifest.lock"

    def read(self, names: Sequence[str] = tuple(TYPES)) -> dict[str, dict[str, Any]]:
        """The entries by file, of files that exist. A torn line does not count; of several of a file the last does.

        Raises:
            UserError: a line is no entry with values of these `names`, or its file lies elsewhere.
        """
        entries, lines = {}, []
        if self.path.exists():
            # Unlike `str.splitlines` this does not split at U+2028 and the like, which other tools write as they are.
            with self.path.open(encoding="utf-8-sig", errors="replace") as file:
                lines = list(file)
        for number, line in enumerate(lines, 1):
            try:
                entry = parse_json(line, self.path)
            except ValueError:  # a run was killed while it wrote the line
                continue
            if not _is_entry(entry, names):
                raise UserError(
                    f"{self.path}, line {number}, is no entry of a video in this folder ({', '.join(names)}): mend or "
                    "remove it."
                )
            entries[entry["file"]] = entry
        return {file: entry for file, entry in entries.items() if os.path.isfile(self.folder / file)}

    def append(self, entry: dict[str, Any]):
        # Over NFS not even appending is atomic.
        with writing(self.path), FileLock(self._lock), self.path.open("a") as file:
            file.write(to_json(entry) + "\n")

    def replace(self, entries: Iterable[dict[str, Any]]):
        """Makes the manifest anew, in the order of the prompts; no other process may append meanwhile."""
        entries = sorted(entries, key=lambda entry: (entry["prompt_index"], entry["video_number"]))
        with replacing(self.path) as partial:
            partial.write_text("".join(to_json(entry) + "\n" for entry in entries))
        self._lock.unlink(missing_ok=True)

    def start(
        self,
        jobs: Sequence[VideoJob],
        settings: dict[str, Any],
        rewards: Collection[str],
        reward_options: dict[str, dict[str, Any]] | None = None,
    ) -> list[VideoJob]:
        """The jobs that are still to be done, after their remains and those of a killed run have been removed.

        A job is done if its file is whole, was made from the same prompt with the same `settings`, and has scores of
        all `rewards` with the same options. A file of its name that is not the manifest's, or not any more, is set
        aside: it may be somebody's. The folder has to be locked, as by a [`RunFolder`].
        """
        entries = self.read()
        for path in self.folder.glob(f"*.mp4{PARTIAL}"):
            if re.match(r"\d{5,}-\d+-.*\.mp4", path.name):  # a job's
                path.unlink()
        pending, aside = [], []
        for job in jobs:
            path, entry = self.folder / job.file, entries.get(job.file)
            wanted = describe(job) | settings
            if entry is None or path.stat().st_size != entry["bytes"]:
                if os.path.lexists(path):
                    set_aside(path)
                    aside.append(path.name)
            elif wanted.items() <= entry.items() and _has_scores(entry, rewards, reward_options or {}):
                continue
            else:
                path.unlink()
            pending.append(job)
            entries.pop(job.file, None)
        if aside:
            print(f"set aside, as .set_aside, because they are not the videos of {self.path.name}: {', '.join(aside)}")
        self.replace(entries.values())
        return pending


def _has_scores(entry: dict[str, Any], rewards: Collection[str], options: dict[str, dict[str, Any]]) -> bool:
    are_there = set(rewards) <= entry.get("scores", {}).keys()
    return are_there and (not rewards or entry.get("reward_options", {}) == options)


def _is_entry(entry: Any, names: Sequence[str]) -> bool:
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), TYPES[name]) for name in names):
        return False
    scores = entry.get("scores", {})
    numbers = int, float, NoneType
    are_scores = isinstance(scores, dict) and all(isinstance(score, numbers) for score in scores.values())
    return are_scores and Path(entry["file"]).name == entry["file"] != ".."


def describe(job: VideoJob) -> dict[str, Any]:
    """What an entry says of its job."""
    return {
        "prompt": job.prompt.text,
        "prompt_index": job.prompt_index,
        "video_number": job.video_number,
        "num_frames": job.num_frames,
    }
