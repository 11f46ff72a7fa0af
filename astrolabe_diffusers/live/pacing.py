"""When the next block of a video is to be made: as late as it can be and still be in time for its viewer."""

import math
from collections import deque

from .model import LiveModel


# What a block may take longer than the slowest of the last ones, on its way too.
_SLACK = 0.15
# So long before it is due the first picture of a block is to be on its way at the latest.
_SPARE = 0.05
# What remains of more than that after a block that was in time.
_CALM = 0.97
_RECENT = 8


class Pacing:
    """
    The flow of one video: what was made of it, sent and shown, and how long blocks took. It has no clock and no lock:
    times are by `time.monotonic`, and its session's lock guards whatever changes it.

    Args:
        model: that makes the blocks.
        lanes: of every block.
        length: of the video, in frames.
        now: when it begins.

    Attributes:
        num_frames: that were made.
        ready_at: when the last block was.
    """

    def __init__(self, model: LiveModel, lanes: int, length: float, now: float):
        self.model, self.lanes, self.length = model, lanes, length
        self.num_frames, self.ready_at = 0, now
        # Ends of blocks, what was shown of them and when, and how long blocks took.
        self._last_frames: deque[int] = deque(maxlen=4)
        self._shown, self._shown_at = -1, None
        self._sent_at = -math.inf  # the newest block
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._slack = _SLACK

    def made(self, num_frames: int, seconds: float, now: float):
        """A block of so many frames, which took so long."""
        # The first one encodes the prompt and allocates.
        if self.num_frames:
            self._recent.append(seconds)
        self.num_frames += num_frames
        self._last_frames.append(self.num_frames - 1)
        self.ready_at = now

    def pause(self):
        """What is shown from now on says nothing of what came late."""
        self._shown_at = None

    def sent(self, frame: int, now: float):
        """The first picture of a block, of this frame, is on its way; in the last lane, if there are two."""
        self._sent_at = now
        if self._shown_at is not None:
            spare = self._shown_at + (frame - self._shown) / self.model.frame_rate - now
            self._make_earlier(_SPARE - spare)

    def _make_earlier(self, seconds: float):
        """Blocks from now on, if it is more than nothing."""
        most = self.model.frames_per_block / self.model.frame_rate
        self._slack = min(self._slack + max(seconds, 0.0), most)

    def show(self, frame: int, now: float) -> bool:
        """The viewer has seen the video up to this frame; whether that is new. One that was not made is of a video
        before this one."""
        before, rate = self._shown, self.model.frame_rate
        if not before < frame < self.num_frames:
            return False
        if self._shown_at is not None and before in self._last_frames:
            self._slack = max(_CALM * self._slack, _SLACK)
            # The picture stood still between two blocks, and not because the second one was sent late.
            late = now - max(self._shown_at + (frame - before) / rate, self._sent_at)
            self._make_earlier(late if late > 1.5 / rate else 0.0)
        self._shown, self._shown_at = frame, now
        return True

    def due_at(self, turn_seconds: float) -> float:
        """
        When the next block is to be made; never while the viewer has more than one block to show.

        It is made as late as it can be and still be in time, so that the latest prompt holds for it: so many seconds
        before the last frame is shown as a turn takes, which is `turn_seconds`, half as much again and some more for
        the way. Between two reports the viewer is taken to go on at the frame rate.
        """
        ahead, rate = self.num_frames - 1 - self._shown, self.model.frame_rate
        if ahead > self.model.frames_per_block:
            return math.inf
        if self._shown_at is None:
            return self.ready_at
        lead = 1.5 * turn_seconds + self._slack
        return self._shown_at + ahead / rate - lead

    def start_delay(self, turn_seconds: float, first_seconds: float = 0.0) -> float:
        """For how long the first block, once it is made, is held back for the second one to be in time: to show it may
        take less than to make the other, before which come first ones of other sessions, which take so much longer
        than a turn. Not where there is no other, or none could be in time."""
        rate = self.model.frame_rate
        if self.num_frames >= self.length or turn_seconds > self.model.frames_per_block / rate:
            return 0.0
        return max(first_seconds + 1.5 * turn_seconds + self._slack - self.num_frames / rate, 0.0)

    @property
    def block_seconds(self) -> float:
        """Of the slowest of the last blocks; before there are any, as a warm model knows it."""
        return max(self._recent, default=self.lanes * self.model.block_seconds)
