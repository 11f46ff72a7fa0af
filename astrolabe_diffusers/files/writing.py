"""Files that are whole or not there, and one line where they cannot be written."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from ..errors import UserError, one_line


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
    ends. After an error nothing is left of it, and what had the name before is as it was.

    Raises:
        UserError: it cannot be written.
    """
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
