"""Output folders: one run in each at a time, and nothing written over that it has not made."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path
from typing import BinaryIO

from .checkpoints import WEIGHT_NAMES
from .config import NFTConfig
from .errors import UserError, as_user_error
from .policies import CURRENT
from .writing import writing


LOCK_NAME = ".lock"
# A run writes it when it ends.
RESULTS_NAME = "results.json"
# All that a training run writes beside what its trackers do, as patterns.
TRAINING_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "eval.jsonl",
    "rewards.png",
    RESULTS_NAME,
    "README.md",
    WEIGHT_NAMES[CURRENT],
    "before_after.mp4",
    "before_after.png",
    "before_after.gif",
    "eval_videos/step-*",
    "checkpoints/checkpoint-*",
)


def lock_folder(folder: Path) -> BinaryIO:
    """Makes a folder and locks it, until the file that is returned is closed.

    Raises:
        UserError: another run, on this machine or on another one, has locked it, or it cannot be made.
    """
    with as_user_error(f"output_dir {str(folder)!r}"):
        folder.mkdir(parents=True, exist_ok=True)
        # Without a buffer: on a full disk closing the file would try to write what is in it, and fail once more.
        lock = (folder / LOCK_NAME).open("a+b", buffering=0)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(f"another run is writing to {folder}: wait for it, or name another folder.") from None
    return lock


class RunFolder:
    """An output folder that is locked until [`~RunFolder.close`].

    Args:
        path: the folder, which is made if it is not there.
        kind: what writes to it. From [`~RunFolder.begin`] on the lock file says so.
        files: the paths in it that the run may write to, as patterns.

    Raises:
        UserError: another run has locked it, or it cannot be made.
    """

    def __init__(self, path: str | Path, kind: str, files: tuple[str, ...]):
        self.path, self.kind, self.files = Path(path), kind, files
        self._lock = lock_folder(self.path)

    def present(self) -> list[str]:
        """What is there of what the run would write."""
        paths = [path for pattern in self.files for path in sorted(self.path.glob(pattern))]
        return [str(path.relative_to(self.path)) for path in paths]

    def has_begun(self) -> bool:
        """Whether a run of this kind has written here."""
        self._lock.seek(0)
        return self._lock.read().strip() == self.kind.encode()

    def refuse_files_of_others(self, overwrite: str):
        """Raises a [`UserError`] if there are files to be written over; `overwrite` is the flag that allows it."""
        if names := self.present():
            listed = ", ".join(names[:5]) + f" and {len(names) - 5} more" * (len(names) > 5)
            raise UserError(
                f"{self.path} has {listed}, which {self.kind} did not make and would write over: name another "
                f"--output_dir, or give {overwrite}."
            )

    def refuse_finished(self):
        """Raises a [`UserError`] if a run has ended here: one that begins anew would write over what it made."""
        if (self.path / RESULTS_NAME).exists():
            raise UserError(
                f"{self.path} holds a finished run, but no whole checkpoint to go on from: another --output_dir "
                "begins anew there, and --overwrite_output_dir true begins anew here."
            )

    def begin(self):
        """Says in the lock file that what is written from now on is a run's."""
        with writing(self.path / LOCK_NAME):
            self._lock.truncate(0)
            self._lock.write(f"{self.kind}\n".encode())

    def remove_files(self):
        """Removes what an earlier run wrote, but for its checkpoints: these are set aside."""
        with writing(self.path):
            for name in self.present():
                path = self.path / name
                if path.parent.name == "checkpoints":
                    continue
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def close(self):
        self._lock.close()


def open_training_folder(config: NFTConfig) -> RunFolder:
    """Locks the folder of a training run. Before anything is loaded, and it changes nothing that is there.

    Raises:
        UserError: a run is writing to it; or it holds a run that this one does not resume, or files of others that it
            would write over, and `overwrite_output_dir` is not set.
    """
    folder = RunFolder(config.output_dir, "training", TRAINING_FILES)
    try:
        if config.overwrite_output_dir or not folder.present():
            return folder
        if not (folder.has_begun() or _is_older_run(folder.path)):
            folder.refuse_files_of_others("--overwrite_output_dir true")
        if not _resumes(config):
            state = "a finished run" if (folder.path / RESULTS_NAME).exists() else "a run that has not ended"
            raise UserError(
                f"{folder.path} holds {state}: --resume_from_checkpoint latest goes on with it, another --output_dir "
                "begins anew there, and --overwrite_output_dir true begins anew here."
            )
    except BaseException:
        folder.close()
        raise
    return folder


def _is_older_run(path: Path) -> bool:
    """Whether a run of a version without a lock file wrote here, or the folder was copied without hidden files."""
    logs = all((path / name).is_file() for name in ("config.yaml", "eval.jsonl"))
    return logs or any(path.glob("checkpoints/checkpoint-*/trainer_state.json"))


def _resumes(config: NFTConfig) -> bool:
    """Whether a run goes on with the one in its output folder, not with one elsewhere."""
    name, checkpoints = config.resume_from_checkpoint, Path(config.output_dir) / "checkpoints"
    if name is None or name == "latest":
        return name is not None
    return not Path(name).is_dir() or Path(name).resolve().parent == checkpoints.resolve()


def open_evaluation_folder(path: str, columns: list[str], overwrite: bool) -> RunFolder:
    """Locks the folder of an evaluation with these columns. One that an evaluation has written is written over.

    Raises:
        UserError: a run is writing to it, or it has files of others that would be written over without `overwrite`.
    """
    files = ("results.json", "table.md", "scores.png", "side_by_side.mp4", "side_by_side.png", "side_by_side.gif")
    folder = RunFolder(path, "evaluation", (*files, *(f"videos/{name}/*.mp4" for name in columns)))
    try:
        if not (overwrite or folder.has_begun() or _is_older_evaluation(folder.path / "results.json")):
            folder.refuse_files_of_others("--overwrite true")
    except BaseException:
        folder.close()
        raise
    return folder


def _is_older_evaluation(results: Path) -> bool:
    try:
        return {"settings", "versions", "videos", "columns"} <= json.loads(results.read_text()).keys()
    except (OSError, ValueError, AttributeError):
        return False
