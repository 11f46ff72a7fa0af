"""Recordings: every frame of a session to a file, while it is made."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import numpy as np

from ..errors import one_line
from ..files.video import VideoWriter
from .app import LiveApp, tell
from .session import Block, LiveSession


logger = logging.getLogger(__name__)

# Of a recording, blocks that wait to be encoded before the session waits for them.
_MAX_BEHIND = 2


class Recorder:
    """
    An MP4 of every frame that it is given, encoded as they come, from any thread. At most `max_frames` of them: what
    comes later is left out.
    """

    def __init__(self, path: Path, height: int, width: int, frame_rate: int, max_frames: int):
        self.path, self.max_frames, self.num_frames = path, max_frames, 0
        self._writer = VideoWriter(path, height, width, frame_rate)
        self._stack = ExitStack()
        self._lock = threading.Lock()

    @property
    def is_full(self) -> bool:
        return self.num_frames >= self.max_frames

    def write(self, frames: np.ndarray):
        """Frames `(F, H, W, 3)`, uint8; an `OSError` if they cannot be written."""
        with self._lock:
            if not self.num_frames:
                self._stack.enter_context(self._writer)
            frames = frames[: self.max_frames - self.num_frames]
            self._writer.write(frames)
            self.num_frames += len(frames)

    def finish(self):
        """The file is whole now, or an `OSError` says that it is not there."""
        with self._lock:
            self._stack.close()

    def discard(self):
        """Nothing is left of it."""
        with self._lock, suppress(OSError):
            self._stack.__exit__(InterruptedError, InterruptedError(), None)


class Recording:
    """
    Every frame of a session from its next block on, to a file. The session waits for it rather than leave one out.

    Args:
        live: whose threads write the file, and which keeps it.
        session: whose frames they are.
        ended: is called with this, the address of the file, if there is one, its frames, and what went wrong, if
            anything; not if it is discarded.
    """

    def __init__(
        self,
        live: LiveApp,
        session: LiveSession,
        ended: Callable[["Recording", str | None, int, str | None], None],
    ):
        self.live, self.session, self._ended = live, session, ended
        self._blocks: deque[Block] = deque()
        self._something = asyncio.Event()
        self._finished = False
        self._recorder: Recorder | None = None
        self._task = asyncio.get_running_loop().create_task(self._run())

    def add(self, block: Block):
        self._blocks.append(block)
        self.session.hold(self, len(self._blocks) >= _MAX_BEHIND)
        self._something.set()

    def finish(self):
        """After what it has; the viewer is told of the file."""
        self._finished = True
        self._something.set()

    async def discard(self):
        """Nothing is left of it."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self):
        url, frames, failure = None, 0, None
        try:
            frames = await self._write()
            url = f"/recordings/{self._recorder.path.stem}.mp4" if frames else None
        except Exception as error:
            logger.error("a recording failed: %s", one_line(error))
            disk = "the server's disk is full, or cannot be written to"
            failure = f"the recording has failed: {disk if isinstance(error, OSError) else tell(error)}"
        finally:
            self.session.hold(self, False)
            self.live.engine.wake()
        self._ended(self, url, frames, failure)

    async def _write(self) -> int:
        call = partial(asyncio.get_running_loop().run_in_executor, self.live.recorders)
        try:
            while not (self._finished and not self._blocks):
                await self._something.wait()
                self._something.clear()
                while self._blocks:
                    frames = self._blocks[0].frames
                    if self._recorder is None:
                        height, width = frames.shape[1:3]
                        size = height, width, self.live.model.frame_rate, self.live.max_recording_frames
                        self._recorder = Recorder(self.live.new_recording(), *size)
                    await call(self._recorder.write, frames)
                    self._blocks.popleft()
                    self.session.hold(self, len(self._blocks) >= _MAX_BEHIND)
                    self.live.engine.wake()
                    if self._recorder.is_full:
                        self._finished = True
                        self._blocks.clear()
            if self._recorder is None:
                return 0
            await call(self._recorder.finish)
            self.live.keep_recording(self._recorder.path)
            return self._recorder.num_frames
        except BaseException:
            if self._recorder:
                self.live.recorders.submit(self._recorder.discard)
            raise
