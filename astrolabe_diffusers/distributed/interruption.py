"""Stopping a run by a signal, in every process at the same place."""

from __future__ import annotations

import os
import signal

from ..errors import Interrupted
from .agreement import leave_if_called_off, raise_together


class Interruption:
    """As a context: SIGTERM, which clusters send before they take a machine away, and SIGINT (Ctrl-C) are noted, and
    the run stops at the next place that asks for it with one of the methods."""

    def __init__(self):
        self._signal: int | None = None

    def __enter__(self) -> Interruption:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame):
        # torchrun sends a signal on to processes that may have got it already.
        if self._signal is None and os.environ.get("LOCAL_RANK", "0") == "0":
            # Not print: it may be what the signal has interrupted.
            os.write(
                2, f"\n{signal.Signals(number).name}: stopping after this batch (Ctrl-\\ does not wait)\n".encode()
            )
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
