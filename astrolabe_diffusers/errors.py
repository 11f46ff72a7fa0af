"""What a user can put right is told in one line."""

import difflib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from safetensors import SafetensorError


class UserError(Exception):
    """A mistake in the configuration or the data of a run. Its message is one complete line, which a script prints
    alone, to exit with code 2 ([`exit_code`]). A bug is never a `UserError` and keeps its traceback."""


class Interrupted(Exception):
    """The signal `number` stopped a run, which has saved what it needs to go on."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return signal.Signals(self.number).name


class ProcessError(Exception):
    """Another process of the run failed, and has printed its traceback."""


def exit_code(run: Callable[[], object]) -> int:
    """Calls `run` and returns the exit code of a script: 0; 2 after a [`UserError`], which is printed; 1 if another
    process failed; and as in a shell 128 + its number after a signal (143 for SIGTERM, 130 for Ctrl-C)."""
    try:
        run()
    except Interrupted as interruption:
        return 128 + interruption.number
    except (UserError, ProcessError) as error:
        message, code = error, 2 if isinstance(error, UserError) else 1
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        # A size in the settings, nearly always; the whole traceback goes to the debug log.
        message, code = f"out of memory, make videos, batches or the LoRA smaller: {name_exception(error)}", 2
    else:
        return 0
    # The other processes would only say the same. What is no number is no other process.
    if not os.environ.get("LOCAL_RANK", "0").lstrip("0").isdigit():
        print(f"error: {message}", file=sys.stderr)
    return code


def _is_out_of_memory(error: Exception) -> bool:
    """On a GPU torch has a class for it, a `RuntimeError`, on a CPU it has not."""
    words = ("out of memory", "can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or any(text in str(error) for text in words)


# What code that checks its arguments raises.
CHECKED = (ValueError, KeyError, OSError, ImportError, SafetensorError)


@contextmanager
def as_user_error(what: str, kinds: tuple[type[Exception], ...] = CHECKED) -> Iterator[None]:
    """Errors of these `kinds` raised inside, by code that checks what the user gave, become [`UserError`]s that begin
    with `what`."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise UserError(f"{what}: {one_line(message)}") from error


def is_missing(module: str, error: ModuleNotFoundError) -> bool:
    """Whether it is `module` that was not found, and not one of its own imports."""
    return error.name is not None and f"{module}.".startswith(f"{error.name}.")


def close_matches(name: str, names: Iterable[str]) -> str:
    """The names that `name` may be a slip of, as a remark to put behind it; empty if there is none."""
    matches = difflib.get_close_matches(name, list(names), n=3)
    return f" (did you mean {' or '.join(matches)}?)" if matches else ""


def one_line(message: object) -> str:
    return " ".join(str(message).split())


def name_exception(error: BaseException) -> str:
    """Type and message of an exception in one line; the whole traceback goes to the debug log."""
    logging.getLogger(__name__).debug("the traceback:", exc_info=error)
    return f"{type(error).__name__}: {one_line(error)}"


def summarize_exception(error: BaseException) -> str:
    """[`name_exception`] with the place where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return name_exception(error) + place
