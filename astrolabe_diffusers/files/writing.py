"""Files and folders that are whole, not there, or known not to be whole; and one line where they cannot be written."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from ..errors import UserError, one_line
from .text import read_json


# Written last, so that a folder without it is not whole.
SEAL_NAME = "files.json"
# What a run that was killed leaves behind ends in this.
PARTIAL = ".partial"


@contextmanager
def writing(what: str | Path) -> Iterator[None]:
    """Inside, a disk that is full or a folder that cannot be written to is a [`UserError`]: cannot write `what`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {what}: {one_line(error)}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields the path of a file beside `path` that gets its name, and the mode that the umask gives, when the block
    ends. After an error, a [`UserError`] if it cannot be written, nothing is left of it, and what had the name before
    is as it was."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # safetensors makes files that only their owner can read. The umask itself can only be read by setting it,
            # for all threads.
            partial.unlink(missing_ok=True)
            partial.touch()
            mode = partial.stat().st_mode
            partial.unlink()
            yield partial
            if partial.exists():
                partial.chmod(mode)
                partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def seal(folder: Path):
    """Writes size and SHA-256 of every file in `folder` into its `files.json`, and waits until all is on the disk."""
    paths = sorted(folder.rglob("*"))
    files = [path for path in paths if path.is_file()]
    described = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }
    (folder / SEAL_NAME).write_text(json.dumps(described, indent=2))
    for path in files:  # safetensors makes files that only their owner can read
        path.chmod((folder / SEAL_NAME).stat().st_mode)
    for path in (*paths, folder / SEAL_NAME, folder):
        to_disk(path)


def find_damage(folder: Path) -> str | None:
    """What is wrong with a folder that [`seal`] closed, in words; `None` if every file is what it was."""
    try:
        files = read_json(folder / SEAL_NAME)
        files = {name: {"bytes": file["bytes"], "sha256": file["sha256"]} for name, file in files.items()}
    except (OSError, ValueError):
        return f"{SEAL_NAME} is missing or unreadable"
    except (AttributeError, TypeError, KeyError):
        return f"{SEAL_NAME} is no list of files with their sizes and digests"
    for name, file in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != file["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {file['bytes']}"
    for name, file in files.items():
        if _sha256(folder / name) != file["sha256"]:
            return f"{name} has changed"
    return None


def to_disk(path: Path):
    """Waits until a file, or the names in a folder, would survive a power cut."""
    if os.name == "nt" and path.is_dir():  # cannot be opened there
        return
    # Windows brings to the disk only what was opened to be written.
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
