"""One thread that makes the blocks of all sessions, in turn."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

from ..errors import one_line, summarize_exception
from .session import Block, LiveSession, Mark


logger = logging.getLogger(__name__)


@dataclass
class Queued:
    """Where a session is in the queue; 0 if it runs. `sessions` run at the same time."""

    position: int
    sessions: int


@dataclass
class Ended:
    """A session has come to its end, for this reason, and has left its place to others."""

    reason: str


Listener = Callable[[Block | Mark | Queued | Ended], None]


class FullError(Exception):
    """As many wait as may."""


class LiveEngine:
    """
    Makes the blocks of up to `sessions` sessions, of those whose next one is due in turns; others wait until one
    leaves. A context manager: the thread ends with the context.

    What happens to a session its listener is told, in the engine's thread: it must not wait for anything. An error of
    one session ends that one alone.

    Args:
        sessions: that are in memory and run.
        waiting: that may wait.
        idle_seconds: a session of which nothing was seen or asked for so long makes room for one that waits.
    """

    def __init__(self, sessions: int = 1, waiting: int = 16, idle_seconds: float = 60.0):
        self.sessions, self.waiting, self.idle_seconds = sessions, waiting, idle_seconds
        self._changed = threading.Condition()
        self._running: dict[LiveSession, Listener] = {}
        self._queue: deque[tuple[LiveSession, Listener]] = deque()
        self._told: dict[LiveSession, Queued] = {}
        self._leaving: list[LiveSession] = []
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="live-engine", daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def add(self, session: LiveSession, listener: Listener, instead_of: LiveSession | None = None):
        """Takes a session in, or lets it wait. `instead_of` another one it has that one's place.

        Raises:
            FullError: there is no place left to wait.
        """
        with self._changed:
            old = [s for s, _ in self._queue]
            if instead_of in self._running:
                del self._running[instead_of]
                self._leaving.append(instead_of)
                self._running[session] = listener
            elif instead_of in old:
                self._queue[old.index(instead_of)] = session, listener
            elif len(self._running) + len(self._queue) >= self.sessions + self.waiting:
                raise FullError(f"{len(self._queue)} viewers are waiting already: come again later.")
            else:
                self._queue.append((session, listener))
            self._told.pop(instead_of, None)
            self._settle()

    def remove(self, session: LiveSession):
        """Its memory is free once the block that is being made is done."""
        with self._changed:
            if self._running.pop(session, None):
                self._leaving.append(session)
            else:
                self._queue = deque(item for item in self._queue if item[0] is not session)
            self._told.pop(session, None)
            self._settle()

    def wake(self):
        """To be called after a session was told something."""
        with self._changed:
            self._changed.notify()

    @property
    def running(self) -> int:
        return len(self._running)

    def _settle(self):
        """Who waits moves up, and is told so."""
        while self._queue and len(self._running) < self.sessions:
            session, listener = self._queue.popleft()
            self._running[session] = listener
        for position, (session, listener) in enumerate(self._queue, 1):
            self._tell(session, listener, position)
        for session, listener in self._running.items():
            self._tell(session, listener, 0)
        self._changed.notify()

    def _tell(self, session: LiveSession, listener: Listener, position: int):
        queued = Queued(position, self.sessions)
        if self._told.get(session) != queued:
            self._told[session] = queued
            # Nothing could be seen of it while it waited.
            session.active_at = time.monotonic()
            listener(queued)

    def _end(self, session: LiveSession, reason: str):
        listener = self._running.get(session)
        if listener is not None:
            self.remove(session)
            listener(Ended(reason))

    def _run(self):
        while True:
            session = None  # or one that has left would be kept while there is nothing to do
            with self._changed:
                leaving, self._leaving = self._leaving, []
                if self._stopped:
                    leaving += self._running
                    self._running.clear()
                elif not leaving:
                    session, seconds = self._next()
                    if session is None:
                        self._changed.wait(seconds)
                        continue
            for left in leaving:
                left.close()
            if self._stopped:
                return
            leaving = left = None
            if session is not None:
                self._make(session)

    def _next(self) -> tuple[LiveSession | None, float | None]:
        """The session whose turn it is, or the seconds until there may be one."""
        now = time.monotonic()
        for session in sorted(self._running, key=attrgetter("active_at")):
            # Who waits has taken the place of the one before.
            if not self._queue or now - session.active_at <= self.idle_seconds:
                break
            self._end(session, f"nothing was seen for {self.idle_seconds:g} s, and others wait")
        turn = sum(session.block_seconds for session in self._running)
        due = {session: session.due_at(turn) for session in self._running}
        # Not that one's first whose frames run out first: one that takes all it can get would always be.
        ready = [session for session in due if due[session] <= now]
        if ready:
            return min(ready, key=attrgetter("ready_at")), 0
        times = list(due.values())
        if self._queue:
            times += [session.active_at + self.idle_seconds for session in self._running]
        until = min(times, default=math.inf)
        return None, None if until == math.inf else max(until - now, 0) + 1e-3

    def _make(self, session: LiveSession):
        before = session.ready_at
        try:
            blocks, marks = session.make_block()
        except StopIteration:
            self._end(session, "the video has come to its end")
        except Exception as error:
            logger.error("a session failed: %s", summarize_exception(error))
            self._end(session, f"the session failed: {one_line(error) or type(error).__name__}")
        else:
            with self._changed:
                listener = self._running.get(session)
                others = [s for s in self._running if s is not session and s.ready_at > before]
                turn = sum(block.seconds for block in blocks) + sum(s.block_seconds for s in others)
                for block in blocks:
                    block.turn_seconds = turn
                if blocks[0].number == 0:
                    session.begins_at = session.ready_at + self._start_delay(session, blocks)
                for item in (*marks, *blocks) if listener else ():
                    listener(item)

    def _start_delay(self, session: LiveSession, blocks: list[Block]) -> float:
        following = [s for s in self._running if not s.paused]
        # First blocks have texts to encode and memory to take: those of others take as long as this one did.
        seconds = sum(block.seconds for block in blocks)
        more = sum(max(seconds - s.block_seconds, 0.0) for s in following if s.num_blocks == 0)
        return session.start_delay(sum(s.block_seconds for s in following), more)
