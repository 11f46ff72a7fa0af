"""Folders that are whole, or known not to be."""

import hashlib
import json
import os
from pathlib import Path

from .text import read_json


# Written last, so that a folder without it is not whole.
SEAL_NAME = "files.json"


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
