"""Output folders: one run in each at a time, and nothing written over that it has not made."""

import itertools
import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from ..errors import UserError, as_user_error
from .writing import replacing, writing


LOCK_NAME = ".lock"
# Says what kind of run has written to the folder. Not the lock file, which filelock may empty or remove.
KIND_NAME = ".run"
# A run writes it when it ends.
RESULTS_NAME = "results.json"


class RunFolder:
    """An output folder. As a context it keeps other runs out, on this machine and on others that share the folder;
    that ends with the process too, however it ends. A [`UserError`] if another run has it, or it cannot be made.

    Args:
        kind: what writes to it. From [`~RunFolder.begin`] on a file in it says so.
        files: the paths in it that the run may write to, as patterns.
    """

    def __init__(self, path: str | Path, kind: str, files: tuple[str, ...] = ()):
        self.path, self.kind, self.files = Path(path), kind, files
        # Not a lock of the thread that takes it: a run may end in another one.
        self._lock = FileLock(self.path / LOCK_NAME, timeout=0, thread_local=False)

    def __enter__(self) -> Self:
        with as_user_error(f"output_dir {str(self.path)!r}"), suppress(Timeout):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        if not self._lock.is_locked:
            raise UserError(f"another run is writing to {self.path}: wait for it, or name another folder.")
        return self

    def __exit__(self, *_):
        # While it is locked: who opens it now sees that it is gone. On Windows filelock removes it.
        with suppress(OSError):
            (self.path / LOCK_NAME).unlink()
        self._lock.release()

    def present(self) -> list[str]:
        """What is there of what the run would write."""
        paths = [path for pattern in self.files for path in sorted(self.path.glob(pattern))]
        return [str(path.relative_to(self.path)) for path in paths]

    def has_begun(self) -> bool:
        """Whether a run of this kind has written here."""
        path = self.path / KIND_NAME
        return path.is_file() and path.read_bytes().strip() == self.kind.encode()

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
        """Says in a file that what is written from now on is a run's."""
        with replacing(self.path / KIND_NAME) as partial:
            partial.write_bytes(f"{self.kind}\n".encode())

    def remove_files(self):
        """Removes what an earlier run wrote, but for its checkpoints: these are set aside."""
        with writing(self.path):
            for path in map(self.path.joinpath, self.present()):
                if path.parent.name == "checkpoints":
                    continue
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def is_result(path: Path, *names: str) -> bool:
    """Whether there is a JSON file with values of these names, as an earlier call of ours has written it."""
    try:
        return set(names) <= json.loads(path.read_text()).keys()
    except (OSError, ValueError, AttributeError):
        return False


def set_aside(path: Path):
    """Gives a file or folder the first name of `NAME.set_aside`, `NAME.set_aside-2`, ... that is free."""
    names = itertools.chain([f"{path.name}.set_aside"], (f"{path.name}.set_aside-{n}" for n in itertools.count(2)))
    path.rename(next(other for name in names if not os.path.lexists(other := path.with_name(name))))


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    paths = (Path(output_dir) / "checkpoints").glob("checkpoint-*")
    return sorted((path for path in paths if re.fullmatch(r"checkpoint-\d+", path.name)), key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))
