"""Where a call of the pipeline is, and whether it is to end: several may be under way on one pipeline."""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(eq=False)
class Call:
    """
    Attributes:
        interrupt: the current block ends with this step and the video with this block.
        block: index of the block being generated.
        timestep: of the step being made, `None` between blocks.
        num_timesteps: steps of the block.
    """

    interrupt: bool = False
    block: int | None = None
    timestep: torch.Tensor | None = None
    num_timesteps: int | None = None


class Calls:
    """The calls of one pipeline that are under way, and which of them each thread is in."""

    def __init__(self):
        self._lock = threading.Lock()
        self._under_way: weakref.WeakSet[Call] = weakref.WeakSet()
        self._thread = threading.local()
        self._latest = Call()

    def __reduce__(self):
        # A copy of a pipeline has none of its calls.
        return Calls, ()

    def begin(self) -> Call:
        """A new call, under way from now on."""
        call = Call()
        with self._lock:
            self._under_way.add(call)
        return call

    @contextmanager
    def run(self, call: Call) -> Iterator[None]:
        """Inside, this thread is in `call`. A callback may run another one."""
        outer = self._running
        self._thread.call = self._latest = call
        try:
            yield
        finally:
            self._thread.call = outer

    @property
    def _running(self) -> Call | None:
        return getattr(self._thread, "call", None)

    @property
    def current(self) -> Call:
        """The call that this thread is in; outside of all of them the one that made the latest block."""
        return self._running or self._latest

    def set_interrupt(self, interrupt: bool):
        """Of the call that this thread is in; outside of all of them, of every call that is under way."""
        with self._lock:
            for call in [self._running] if self._running else list(self._under_way):
                call.interrupt = interrupt
