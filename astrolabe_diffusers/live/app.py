"""What all connections of a server share: its model, engine, encoders and recordings, and who may come in."""

import logging
import math
import secrets
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import CHECKED, one_line, summarize_exception
from ..serving.binding import names_this_machine
from .encoding import PROTOCOL_VERSION, available_codecs
from .engine import FullError, LiveEngine
from .model import MAX_TRANSITION_BLOCKS, LiveModel
from .record import MAX_SESSION_BYTES
from .start_file import MAX_BYTES


logger = logging.getLogger(__name__)


def tell(error: Exception) -> str:
    """What a viewer is told of an error. One that no check has raised is the server's own, and goes to its log."""
    if not isinstance(error, (FullError, *CHECKED)):
        logger.error("a message failed: %s", summarize_exception(error))
    return one_line(error.args[0] if error.args else error)[:500] or type(error).__name__


class LiveApp(AbstractContextManager):
    """
    What the server of one model has: its engine, encoders, recordings and viewers. A context manager: threads and
    files end with the context.

    Args:
        model: that the sessions are made with.
        engine: that makes their blocks; it is started and stopped here.
        token: what viewers have to know, if anything.
        any_host: whether pages of any name may be this one's. Else, without a token, only names of this machine are
            served: a page of elsewhere whose name is made to mean this machine is not.
        codecs: that frames may be sent in, the best first.
        presets: prompts that the page offers.
        max_recordings, max_recording_seconds: files that are kept, and the length of one.
    """

    def __init__(
        self,
        model: LiveModel,
        engine: LiveEngine,
        token: str | None = None,
        any_host: bool = False,
        codecs: Sequence[str] | None = None,
        presets: Sequence[str] = (),
        max_recordings: int = 16,
        max_recording_seconds: float = 600.0,
    ):
        self.model, self.engine, self.token = model, engine, token
        self.any_host = any_host or bool(token)
        self.codecs = available_codecs() if codecs is None else available_codecs(codecs)
        if not self.codecs:
            raise ValueError("h264 needs PyAV, which 'astrolabe_diffusers[live]' has; jpeg and webp need nothing.")
        self.presets = list(presets)
        self.max_recordings = max_recordings
        self.max_recording_frames = max(int(max_recording_seconds * model.frame_rate), 1)
        self.recordings: dict[str, Path] = {}
        self.viewers = set()  # each a `Viewer`, which comes and goes by itself
        self._folder = tempfile.TemporaryDirectory(prefix="astrolabe-live-")
        # Those that wait for a recording's encoder are not those that the frames of others wait for.
        self.encoders = ThreadPoolExecutor(engine.sessions + 1, "live-encode")
        self.recorders = ThreadPoolExecutor(engine.sessions + 1, "live-record")
        # Two at a time: files of viewers take two cores at most from what is made.
        self.decoders = ThreadPoolExecutor(2, "live-decode")
        self.num_checks = 0

    def __enter__(self):
        self.engine.__enter__()
        return self

    def __exit__(self, *error):
        self.engine.__exit__(*error)
        self.encoders.shutdown()
        self.recorders.shutdown()
        self.decoders.shutdown(cancel_futures=True)
        self._folder.cleanup()

    def new_recording(self) -> Path:
        return Path(self._folder.name, f"{secrets.token_urlsafe(16)}.mp4")

    def keep_recording(self, path: Path):
        self.recordings[path.stem] = path
        while len(self.recordings) > self.max_recordings:
            self.recordings.pop(next(iter(self.recordings))).unlink(missing_ok=True)

    def hello(self) -> dict[str, Any]:
        model = self.model
        return {
            "type": "hello",
            "version": PROTOCOL_VERSION,
            "model": model.name,
            "frame_rate": model.frame_rate,
            "height": model.pipe.config.height,
            "width": model.pipe.config.width,
            "max_pixels": model.max_pixels,
            "frames_first_block": model.frames_first_block,
            "frames_per_block": model.frames_per_block,
            "num_frames": None if model.num_frames == math.inf else model.num_frames,
            "transitions": list(model.pipe.transitions),
            "max_transition_blocks": MAX_TRANSITION_BLOCKS,
            "presets": self.presets,
            "loras": model.weights,
            "codecs": self.codecs,
            "sessions": self.engine.sessions,
            "start_media": model.start_media,
            "max_upload": MAX_BYTES,
            "max_session": MAX_SESSION_BYTES,
        }

    # Who may come in

    def knows(self, token: str | None) -> bool:
        return not self.token or secrets.compare_digest((token or "").encode(), self.token.encode())

    def serves(self, host: str) -> bool:
        """Whether `Host` of a request is a name of this server."""
        return self.any_host or names_this_machine(host)

    def is_own(self, origin: str | None, host: str) -> bool:
        """Whether a request comes from this server's own page, or from no page."""
        if origin is None:
            return True
        with suppress(ValueError):
            return urlsplit(origin).netloc == host
        return False
