"""What is in an output folder: a line of JSON for every complete video."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..training.errors import UserError
from .jobs import Job
from .video_file import PARTIAL


class Manifest:
    """
    `manifest.jsonl` of an output folder. Several processes may append to it at the same time.

    An entry has all that determines the video (prompt, seed, size, model, LoRAs, ...), `file` and its size in `bytes`,
    `seconds` (the time its batch took, divided by the videos of the batch), `frames_per_second` (frames by `seconds`),
    and with rewards `scores`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / "manifest.jsonl"

    def read(self) -> dict[str, dict[str, Any]]:
        """The entries by file, of files that exist. A torn line does not count; of several of a file the last does."""
        entries = {}
        for line in self.path.read_text().splitlines() if self.path.is_file() else ():
            try:
                entry = json.loads(line)
            except ValueError:  # a run was killed while it wrote the line
                continue
            entries[entry["file"]] = entry
        return {file: entry for file, entry in entries.items() if (self.folder / file).is_file()}

    def append(self, entry: dict[str, Any]):
        with self.path.open("a") as file:
            # Over NFS not even appending is atomic. Closing the file writes the line and gives back the lock.
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(json.dumps(entry) + "\n")

    def replace(self, entries: Iterable[dict[str, Any]]):
        """Makes the manifest anew, in the order of the prompts; no other process may append meanwhile."""
        entries = sorted(entries, key=lambda entry: (entry["prompt_index"], entry["video_number"]))
        partial = self.path.with_name(self.path.name + PARTIAL)
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        partial.replace(self.path)

    def start(self, jobs: Sequence[Job], settings: dict[str, Any], rewards: Iterable[str]) -> list[Job]:
        """The jobs that are still to be done, after their remains and those of a killed run have been removed.

        A job is done if its file is whole, was made from the same prompt with the same `settings`, and has scores of
        all `rewards`. Until this object goes, no other run may start in the folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing to {self.folder}: wait for it, or name another folder.") from None
        for path in self.folder.glob(f"*.mp4{PARTIAL}"):
            path.unlink()
        entries = self.read()
        pending = []
        for job in jobs:
            path, entry = self.folder / job.file, entries.get(job.file)
            if (
                entry is None
                or path.stat().st_size != entry["bytes"]
                or not (describe(job) | settings).items() <= entry.items()
                or not set(rewards) <= entry.get("scores", {}).keys()
            ):
                pending.append(job)
                entries.pop(job.file, None)
                path.unlink(missing_ok=True)
        self.replace(entries.values())
        return pending


def describe(job: Job) -> dict[str, Any]:
    """What an entry says of its job."""
    return {
        "prompt": job.prompt.text,
        "prompt_index": job.prompt_index,
        "video_number": job.video_number,
        "num_frames": job.num_frames,
    }
