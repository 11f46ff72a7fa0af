"""Files that viewers send in parts: one that a video starts from, and a session that is to be replayed."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .app import LiveApp, tell
from .model import LiveModel, check_whole_number
from .record import MAX_SESSION_BYTES, read_session
from .start_file import MAX_BYTES, StartFile


# Of all viewers, files that wait to be looked at.
_MAX_CHECKS = 8


def _read_start(model: LiveModel, data: bytes) -> tuple[StartFile, None]:
    return model.read_start(data), None


def _read_session(model: LiveModel, data: bytes) -> tuple[StartFile | None, dict[str, Any]]:
    arguments = read_session(model, data)
    file = arguments.get("start_file")
    if file:
        model.num_start_frames(file)
    return file, arguments


# What may be sent in parts: the bytes that it may have, and what reads it.
UPLOADS = {"start_frames": (MAX_BYTES, _read_start), "session": (MAX_SESSION_BYTES, _read_session)}


@dataclass
class Upload:
    """A file of `size` bytes that is coming, what it has, of `UPLOADS`, and what has come of it."""

    size: int
    content: str
    data: bytearray = field(default_factory=bytearray)


class Uploads:
    """
    The files that one viewer sends, one after the other, and what came of them.

    Args:
        live: whose threads look at files.
        say: tells the viewer a message.

    Attributes:
        start_file: what the next session starts from.
        replay: the session that was sent to be replayed, as arguments.
    """

    def __init__(self, live: LiveApp, say: Callable[[dict[str, Any]], None]):
        self.live, self._say = live, say
        self.start_file: StartFile | None = None
        self.replay: dict[str, Any] | None = None
        # A file that is coming, and one that is looked at.
        self._upload: Upload | None = None
        self._looking: asyncio.Task | None = None

    def begin(self, message: dict[str, Any]):
        """A file is to come, as the message `upload` says; a `ValueError` if it cannot."""
        self._wait_for_the_one_before()
        content = message.get("content", "start_frames")
        if not isinstance(content, str) or content not in UPLOADS:
            raise ValueError(f"content must be one of {', '.join(UPLOADS)}.")
        check_whole_number("bytes", message.get("bytes"), UPLOADS[content][0], least=1)
        self._upload = Upload(message["bytes"], content)
        self._say({"type": "received", "bytes": 0})

    def remove(self):
        """The next session starts from nothing."""
        self._wait_for_the_one_before()
        self._upload = self.start_file = None
        self._say(self._start_frames())

    def _wait_for_the_one_before(self):
        if self._looking:
            raise ValueError("the file before is still looked at: wait for its start_frames.")

    def receive(self, data: bytes):
        """A part of the file that is coming; a `ValueError` if there is none, or it is too long."""
        upload = self._upload
        if upload is None:
            raise ValueError("a message is a text, an object of JSON; bytes come after an upload.")
        upload.data += data
        if len(upload.data) < upload.size:
            self._say({"type": "received", "bytes": len(upload.data)})
            return
        self._upload = None
        if len(upload.data) > upload.size:
            raise ValueError(f"{len(upload.data)} bytes came of a file of {upload.size}.")
        if self.live.num_checks >= _MAX_CHECKS:
            self._say(self._start_frames("too many files wait to be looked at: try again."))
            return
        self.live.num_checks += 1
        self._looking = asyncio.get_running_loop().create_task(self._look_at(bytes(upload.data), upload.content))

    async def _look_at(self, data: bytes, content: str):
        """Beside what is read and sent; also when the viewer has left. The file before stays if this one is wrong."""
        error = None
        _, read = UPLOADS[content]
        try:
            found = await asyncio.get_running_loop().run_in_executor(self.live.decoders, read, self.live.model, data)
            self.start_file, self.replay = found
        except Exception as wrong:
            error = tell(wrong)
        finally:
            self.live.num_checks -= 1
            self._looking = None
        self._say(self._start_frames(error))

    def _start_frames(self, error: str | None = None) -> dict[str, Any]:
        file = self.start_file
        return {
            "type": "start_frames",
            "media": file and file.media,
            "frames": file and self.live.model.num_start_frames(file),
            "thumbnail": file and file.thumbnail,
            "error": error,
        }
