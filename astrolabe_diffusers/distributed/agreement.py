"""What happens to one process of a run and concerns them all: errors, and a wish to stop."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Self

import torch.distributed
from accelerate.utils import gather_object

from ..errors import Interrupted, ProcessError, UserError, summarize_exception


CALLED_OFF = "astrolabe/called_off"


def is_first_process() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


class Resources(ExitStack):
    """What a run lets go of at its end, whatever happens: threads and processes of rewards, trackers, a folder's lock.

    After an error in a run of several processes this is left to the end of the process: the launcher ends all of them
    as soon as one has ended, and an error that waited for a thread or a tracker would not be printed any more.
    """

    def __exit__(self, kind, error, trace):
        if error is None or not torch.distributed.is_initialized():
            return super().__exit__(kind, error, trace)


@contextmanager
def raise_together() -> Iterator[None]:
    """An error inside, in any process, is raised in every process at the end of the block.

    Without it one process would fail and the others wait for it in their next collective operation. Every process
    enters the block, and there must be no collective operation in it. One that takes long calls
    [`leave_if_called_off`] now and then, in order to fail soon when another does.

    Raises:
        UserError, Interrupted: as raised by any process; an error goes before an interruption.
        ProcessError: in the other processes, if the error was of another kind.
    """
    error = None
    try:
        yield
    except Exception as failure:
        if not torch.distributed.is_initialized():
            raise
        error = failure
        _store().set(CALLED_OFF, "")
    if not torch.distributed.is_initialized():
        return
    told = error
    if error and not isinstance(error, (UserError, Interrupted, _CalledOff)):
        told = ProcessError(f"process {torch.distributed.get_rank()} failed: {summarize_exception(error)}")
    # The first process's error, of those that are worth the most.
    errors = [failure for failure in gather_object([told]) if failure]
    if errors:
        worst = min(errors, key=lambda failure: isinstance(failure, Interrupted) + 2 * isinstance(failure, _CalledOff))
        raise error if isinstance(told, ProcessError) else worst


@contextmanager
def tell_if_alone() -> Iterator[None]:
    """An error inside that other processes will not hear of is printed by this one, before it ends with it.

    [`exit_code`] prints those of a machine's first process, and others are theirs too.
    """
    try:
        yield
    except Exception as error:
        # One that `raise_together` has raised is known to all.
        if os.environ.get("LOCAL_RANK", "0") != "0" and not _store().check([CALLED_OFF]):
            told = error if isinstance(error, UserError) else summarize_exception(error)
            print(f"error: process {torch.distributed.get_rank()}: {told}", file=sys.stderr)
        raise


def leave_if_called_off():
    """Raises if another process has left the [`raise_together`] block that this one is in. It does not wait."""
    if torch.distributed.is_initialized() and _store().check([CALLED_OFF]):
        raise _CalledOff


class _CalledOff(Exception):
    """Another process raised something, which comes out at the end of the block."""


def _store() -> torch.distributed.Store:
    # The key-value store of the process group: unlike a collective operation it can be asked without waiting.
    return torch.distributed.distributed_c10d._get_default_store()


class Interruption:
    """As a context: SIGTERM, which clusters send before they take a machine away, and SIGINT (Ctrl-C) are noted, and
    the run stops at the next place that asks for it with one of the methods."""

    def __init__(self):
        self._signal: int | None = None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame):
        # torchrun sends a signal on to processes that may have got it already.
        if self._signal is None and os.environ.get("LOCAL_RANK", "0") == "0":
            # Not print: it may be what the signal has interrupted.
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: stopping after this batch (Ctrl-\\ does not wait)\n".encode())
        self._signal = number

    def check(self):
        """For the batches of a [`raise_together`] block: raises [`Interrupted`] if this process has got a signal, and
        leaves the block if another process did."""
        if self._signal is not None:
            raise Interrupted(self._signal)
        leave_if_called_off()

    def check_together(self):
        """Raises [`Interrupted`] in every process if any has got a signal; every process has to call it."""
        with raise_together():
            self.check()
