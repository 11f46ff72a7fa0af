"""
The page and its WebSocket: what a viewer asks for goes to the engine, what the engine makes goes to the viewer.

docs/live.md has the messages. Whatever a viewer sends, the answer is a line, and one that is not read costs no memory:
of frames the first block and the newest wait, of words a few.
"""

import asyncio
import json
import logging
import math
import secrets
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import CHECKED, one_line, summarize_exception
from ..files.text import parse_json
from ..serving.binding import is_loopback
from .encoding import PROTOCOL_VERSION, Recorder, available_codecs, make_encoder, pack_picture
from .engine import Ended, FullError, LiveEngine, Queued
from .session import (
    MAX_SEED,
    MAX_SESSION_BYTES,
    MAX_TRANSITION_BLOCKS,
    Block,
    LiveModel,
    LiveSession,
    Mark,
    check_whole_number,
    read_session,
)
from .start_file import MAX_BYTES, StartFile


try:
    from fastapi import APIRouter, FastAPI, Request, WebSocket, WebSocketDisconnect
    from fastapi.responses import FileResponse, JSONResponse, Response
    from fastapi.staticfiles import StaticFiles

    from ..serving.bounded_protocol import ConnectionLimits, make_server
    from ..serving.bounded_websocket import BoundedWebSocket
except ImportError as error:
    raise ImportError(
        f"the live page needs FastAPI and websockets ({error}): pip install 'astrolabe_diffusers[live]'"
    ) from error


logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
MAX_MESSAGE = 2**16
# Of a connection, messages that come; a page tells of every frame that it shows.
MESSAGES_PER_SECOND = 200
# Of a connection, words that wait to be read, and those that wait to be answered.
_MAX_WAITING = 256
# Of a recording, blocks that wait to be encoded before the session waits for them.
_MAX_BEHIND = 2
# Of all viewers, files that wait to be looked at.
_MAX_CHECKS = 8
# For which a page may stay on which nothing runs or waits, and nothing is done.
IDLE_SECONDS = 300.0
# Connections beyond those of viewers, for the page's files, recordings and /health.
HTTP_CONNECTIONS = 8
POLICY_VIOLATION = 1008
HEADERS = {
    # Nothing is from elsewhere, and what a viewer types runs nowhere.
    "Content-Security-Policy": (
        "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' blob: data:; media-src 'self' blob:; "
        "worker-src 'self' blob:; connect-src 'self' ws: wss:; object-src 'none'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    # An address may have the token.
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class ViewerError(Exception):
    """What a viewer did that ends the connection."""


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
        self.viewers: set[Viewer] = set()
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
        with suppress(ValueError):
            return self.any_host or is_loopback(urlsplit(f"//{host}").hostname or "")
        return False

    def is_own(self, origin: str | None, host: str) -> bool:
        """Whether a request comes from this server's own page, or from no page."""
        if origin is None:
            return True
        with suppress(ValueError):
            return urlsplit(origin).netloc == host
        return False


router = APIRouter()


@router.get("/health")
async def health(request: Request):
    """Without a token."""
    return {"status": "ok", "sessions": request.app.state.live.engine.running}


@router.get("/")
async def page():
    return FileResponse(PAGE / "index.html")


@router.get("/recordings/{name}.mp4")
async def recording(request: Request, name: str, token: str | None = None):
    live: LiveApp = request.app.state.live
    if not live.knows(token):
        return JSONResponse({"error": "no token, or a wrong one"}, 401)
    if name not in live.recordings:
        return JSONResponse({"error": "there is no such recording, or not any more"}, 404)
    return FileResponse(live.recordings[name], media_type="video/mp4", filename="astrolabe.mp4")


@router.get("/sessions/{name}.json")
async def session(request: Request, name: str, token: str | None = None):
    """Of a viewer who is there. Not over the WebSocket, where pictures and pings would wait behind a large one."""
    live: LiveApp = request.app.state.live
    if not live.knows(token):
        return JSONResponse({"error": "no token, or a wrong one"}, 401)
    record = next((viewer.session.record() for viewer in live.viewers if viewer.name == name and viewer.session), None)
    if record is None:
        return JSONResponse({"error": "there is no such session, or not any more"}, 404)
    headers = {"Content-Disposition": f'attachment; filename="session-{record["seed"]}.json"'}
    return Response(json.dumps(record, indent=1), media_type="application/json", headers=headers)


@router.websocket("/ws")
async def connect(websocket: WebSocket, token: str | None = None):
    live: LiveApp = websocket.app.state.live
    host = websocket.headers.get("host", "")
    if not live.serves(host) or not live.is_own(websocket.headers.get("origin"), host):
        await websocket.close()  # before it was accepted: status 403
        return
    await websocket.accept()
    viewer = Viewer(websocket, live)
    if not live.knows(token):
        await viewer.leave("this server wants its token: open the page by the address that has it", POLICY_VIOLATION)
        return
    if len(live.viewers) >= websocket.app.state.max_viewers:
        text = f"{len(live.viewers)} pages are open already, and there may be no more: reload it later"
        await viewer.leave(text, POLICY_VIOLATION)
        return
    await viewer.run()


class Viewer:
    """One connection, and the session that it has, if any."""

    def __init__(self, websocket: WebSocket, live: LiveApp):
        self.websocket, self.live = websocket, live
        self.name = secrets.token_urlsafe(16)
        self.loop = asyncio.get_running_loop()
        self.session: LiveSession | None = None
        self.ended = True  # or it runs or waits
        self._seen_at = time.monotonic()  # of the viewer, that something was done
        # Of the start messages that have come, and which of them the session is of.
        self.num_starts = self.start_number = 0
        self.codec: str | None = None
        self.encoders = []  # of the lanes
        self.recording: Recording | None = None
        # What the next session starts from, and the one that was sent to be replayed, as arguments; a file that is
        # coming, and one that is looked at.
        self.start_file: StartFile | None = None
        self.replay: dict[str, Any] | None = None
        self._upload: Upload | None = None
        self._looking: asyncio.Task | None = None
        # What is to be sent, words and blocks, and when by `time.monotonic`: always the first one that is due.
        self._outbox: deque[tuple[float, dict[str, Any] | Block]] = deque()
        self._sent = 0  # the last block of which a lane was sent
        self._something = asyncio.Event()
        # What is answered in its order: a start may take long.
        self._inbox: asyncio.Queue[dict[str, Any] | bytes] = asyncio.Queue(_MAX_WAITING)
        self._unread = self.loop.create_future()
        self._allowance, self._counted_at = float(MESSAGES_PER_SECOND), time.monotonic()

    # From the viewer

    async def run(self):
        self.live.viewers.add(self)
        self.say(self.live.hello())
        tasks = [self.loop.create_task(run()) for run in (self._read, self._answer, self._write, self._watch)]
        try:
            done, _ = await asyncio.wait([*tasks, self._unread], return_when=asyncio.FIRST_COMPLETED)
            if self._unread.done():
                raise ViewerError("messages are not read")
            for task in done:
                task.result()
        except ViewerError as error:
            self._end_session()
            for task in tasks:
                task.cancel()
            await self.leave(str(error), POLICY_VIOLATION)
        except WebSocketDisconnect:
            pass
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.live.viewers.discard(self)
            self._end_session()
            if self.recording:
                await self.recording.discard()

    async def leave(self, reason: str, code: int):
        """A line, and the end."""
        with suppress(WebSocketDisconnect, RuntimeError):
            await self.websocket.send_text(json.dumps({"type": "error", "message": reason}))
            await self.websocket.close(code, reason[:120])

    async def _read(self):
        while True:
            message = await self.websocket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect
            self._count()
            with self._telling():
                data = message.get("bytes")
                message = _read_message(message["text"]) if data is None else data
                if data is not None or "start" not in message:
                    await self._inbox.put(message)
                elif message["start"] == self.start_number:
                    await ANSWERS[message["type"]](self, message)

    async def _answer(self):
        while True:
            message = await self._inbox.get()
            with self._telling():
                if isinstance(message, bytes):
                    self._receive(message)
                    continue
                if message["type"] not in _BEFORE_START and self.session is None:
                    raise ValueError("there is no video: start one first.")
                await ANSWERS[message["type"]](self, message)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """The viewer is told of an error."""
        try:
            yield
        except Exception as error:
            self.say({"type": "error", "message": tell(error)})

    async def _watch(self):
        """Ends the connection of a page that is left open."""
        while not self.ended or time.monotonic() - self._seen_at < IDLE_SECONDS:
            await asyncio.sleep(IDLE_SECONDS / 10)
        raise ViewerError(f"nothing ran for {IDLE_SECONDS / 60:g} minutes: reload the page to go on")

    def _count(self):
        now = self._seen_at = time.monotonic()
        self._allowance += (now - self._counted_at) * MESSAGES_PER_SECOND
        self._allowance, self._counted_at = min(self._allowance, 2.0 * MESSAGES_PER_SECOND) - 1, now
        if self._allowance < 0:
            raise ViewerError(f"more than {MESSAGES_PER_SECOND} messages a second")

    async def _start(self, message: dict[str, Any]):
        self.num_starts += 1
        wanted = message.get("codecs", self.live.codecs)
        codec = next((c for c in self.live.codecs if isinstance(wanted, list) and c in wanted), None)
        if codec is None:
            raise ValueError(f"codecs must be a list with one of {', '.join(self.live.codecs)}.")
        if not isinstance(message.get("replay", False), bool):
            raise ValueError("replay must be true or false.")
        arguments = self.replay if message.get("replay") else self._arguments(message)
        if arguments is None:
            raise ValueError("there is no session to replay: upload one first.")
        self.replay = None
        pool = self.live.decoders if arguments.get("start_file") else self.live.encoders
        session = await self.loop.run_in_executor(pool, partial(LiveSession, self.live.model, **arguments))
        size = session.height, session.width, self.live.model.frame_rate
        encoders = [
            await self.loop.run_in_executor(self.live.encoders, make_encoder, codec, *size)
            for _ in range(1 + session.compare)
        ]
        self.live.engine.add(session, self._listener(session), instead_of=self.session)
        self.session, self.codec, self.encoders = session, codec, encoders
        self.start_number, self.ended = self.num_starts, False
        self._end_recording()
        self._drop_blocks()

    def _arguments(self, message: dict[str, Any]) -> dict[str, Any]:
        seed = message.get("seed")
        return {
            "prompt": message.get("prompt"),
            "seed": secrets.randbelow(MAX_SEED) if seed is None else seed,
            "height": message.get("height"),
            "width": message.get("width"),
            "compare": False if message.get("compare") is None else message["compare"],
            "events": message.get("events") or (),
            "start_file": self.start_file,
            "strength": message.get("strength"),
        }

    async def _change(self, message: dict[str, Any]):
        self.session.send(message)
        self.live.engine.wake()

    async def _pause(self, message: dict[str, Any]):
        self.session.pause(message["type"] == "pause")
        self.live.engine.wake()

    async def _shown(self, message: dict[str, Any]):
        self.session.show(message.get("frame"))
        self.live.engine.wake()

    async def _record(self, message: dict[str, Any]):
        if not isinstance(message.get("on"), bool):
            raise ValueError("on must be true or false.")
        if not message["on"] and self.recording:
            self._end_recording()
            return
        if message["on"] and self.recording is None:
            self.recording = Recording(self, self.session)
        self.say_recording()

    async def _begin_upload(self, message: dict[str, Any]):
        self._wait_for_the_one_before()
        content = message.get("content", "start_frames")
        if not isinstance(content, str) or content not in UPLOADS:
            raise ValueError(f"content must be one of {', '.join(UPLOADS)}.")
        check_whole_number("bytes", message.get("bytes"), UPLOADS[content][0], least=1)
        self._upload = Upload(message["bytes"], content)
        self.say({"type": "received", "bytes": 0})

    async def _remove(self, message: dict[str, Any]):
        self._wait_for_the_one_before()
        self._upload = self.start_file = None
        self.say(self._start_frames())

    def _wait_for_the_one_before(self):
        if self._looking:
            raise ValueError("the file before is still looked at: wait for its start_frames.")

    def _receive(self, data: bytes):
        upload = self._upload
        if upload is None:
            raise ValueError("a message is a text, an object of JSON; bytes come after an upload.")
        upload.data += data
        if len(upload.data) < upload.size:
            self.say({"type": "received", "bytes": len(upload.data)})
            return
        self._upload = None
        if len(upload.data) > upload.size:
            raise ValueError(f"{len(upload.data)} bytes came of a file of {upload.size}.")
        if self.live.num_checks >= _MAX_CHECKS:
            self.say(self._start_frames("too many files wait to be looked at: try again."))
            return
        self.live.num_checks += 1
        self._looking = self.loop.create_task(self._look_at(bytes(upload.data), upload.content))

    async def _look_at(self, data: bytes, content: str):
        """Beside what is read and sent; also when the viewer has left. The file before stays if this one is wrong."""
        error = None
        _, read = UPLOADS[content]
        try:
            found = await self.loop.run_in_executor(self.live.decoders, read, self.live.model, data)
            self.start_file, self.replay = found
        except Exception as wrong:
            error = tell(wrong)
        finally:
            self.live.num_checks -= 1
            self._looking = None
        self.say(self._start_frames(error))

    def _start_frames(self, error: str | None = None) -> dict[str, Any]:
        file = self.start_file
        return {
            "type": "start_frames",
            "media": file and file.media,
            "frames": file and self.live.model.num_start_frames(file),
            "thumbnail": file and file.thumbnail,
            "error": error,
        }

    def _end_session(self):
        if self.session:
            self.live.engine.remove(self.session)
        self.session = None

    def _end_recording(self):
        recording, self.recording = self.recording, None
        if recording:
            recording.finish()

    # To the viewer

    def say_recording(self, url: str | None = None, frames: int = 0):
        """Whether there is a recording now, and what came of one that has ended."""
        self.say({"type": "recording", "on": self.recording is not None, "url": url, "frames": frames})

    def say(self, message: dict[str, Any], due: float = 0.0):
        if len(self._outbox) < _MAX_WAITING:
            self._outbox.append((due, message))
            self._something.set()
        elif not self._unread.done():
            self._unread.set_result(None)

    def _listener(self, session: LiveSession) -> Callable[[object], None]:
        def listen(item):
            with suppress(RuntimeError):  # the loop is closed: the server ends
                self.loop.call_soon_threadsafe(self._take, session, item)

        return listen

    def _take(self, session: LiveSession, item: Block | Mark | Queued | Ended):
        if session is not self.session:
            return
        if isinstance(item, Block):
            if self.recording and item.lane == session.compare:
                self.recording.add(item)
            self._put_block(item, session.begins_at)
        elif isinstance(item, Mark):
            self.say({"type": "mark", **vars(item)}, session.begins_at)
        elif isinstance(item, Queued):
            self.say({"type": "queue", **vars(item), "start": self.start_number})
            if item.position == 0:
                self.say(self._started(session))
        else:
            self._end_recording()
            self.ended, self._seen_at = True, time.monotonic()
            self.say({"type": "ended", "reason": item.reason}, session.begins_at)

    def _put_block(self, block: Block, due: float):
        """In place of one that was not sent; not of the first one, which may be held back, nor of half a block, whose
        other lane is sent already."""
        for i, (_, item) in enumerate(self._outbox):
            if isinstance(item, Block) and item.lane == block.lane and item.number not in (0, self._sent):
                self._outbox[i] = due, block
                return
        self._outbox.append((due, block))
        self._something.set()

    def _drop_blocks(self):
        """What was said behind them waits no longer."""
        self._outbox = deque((0.0, item) for _, item in self._outbox if isinstance(item, dict))
        self._something.set()

    def _started(self, session: LiveSession) -> dict[str, Any]:
        return {
            "type": "started",
            "start": self.start_number,
            "session_url": f"/sessions/{self.name}.json",
            "seed": session.seed,
            "height": session.height,
            "width": session.width,
            "compare": session.compare,
            "loras": dict(session.weights),
            "codec": self.codec,
            "codec_string": self.encoders[0].codec_string,
        }

    async def _write(self):
        while True:
            self._something.clear()
            now = time.monotonic()
            times = [due for due, _ in self._outbox]
            i = next((i for i, due in enumerate(times) if due <= now), None)
            if i is None:
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(times) - now if times else None):
                        await self._something.wait()
                continue
            _, item = self._outbox[i]
            del self._outbox[i]
            if isinstance(item, dict):
                await self._send(json.dumps(item))
            else:
                await self._send_block(item)

    async def _send_block(self, block: Block):
        """Each picture as soon as it is encoded: a block may take a good part of the time for which it is shown."""
        session, codec, end = self.session, self.codec, block.first_frame + len(block.frames)
        self._sent = block.number
        pictures = self.encoders[block.lane].encode(block.frames)
        for frame in range(block.first_frame, end):
            try:
                picture = await self.loop.run_in_executor(self.live.encoders, next, pictures)
            except Exception as error:
                self.live.engine.remove(session)
                if session is self.session:
                    self._drop_blocks()
                self._take(session, Ended(f"its frames cannot be sent as {codec}: {tell(error)}"))
                return
            if session is not self.session:
                return
            if frame == block.first_frame:
                await self._send(json.dumps(self._about(block)))
            await self._send(pack_picture(block, frame, picture))
            if frame == block.first_frame and block.lane == session.compare:
                session.sent(frame)

    def _about(self, block: Block) -> dict[str, Any]:
        about = {"type": "block", "block": block.number, "first_frame": block.first_frame}
        about |= {"frames": len(block.frames), "seconds": block.seconds, "turn_seconds": block.turn_seconds}
        return about | {"memory_gb": block.memory_gb, "lane": block.lane}

    async def _send(self, data: str | bytes):
        try:
            await (self.websocket.send_text if isinstance(data, str) else self.websocket.send_bytes)(data)
        except RuntimeError:  # it was closed by another task
            raise WebSocketDisconnect from None


def _read_message(text: str) -> dict[str, Any]:
    """With a `start` it is about the video of that one alone, and is answered though another one is being made."""
    message = parse_json(text, "the message")
    kind = message.get("type") if isinstance(message, dict) else None
    if not isinstance(kind, str) or kind not in ANSWERS:
        raise ValueError(f"the type of a message is one of {', '.join(ANSWERS)}.")
    if "start" in message:
        if kind in _BEFORE_START:
            raise ValueError(f"a message of type {kind} has no start.")
        check_whole_number("start", message["start"], MAX_SEED, least=1)
    return message


def _read_start(model: LiveModel, data: bytes) -> tuple[StartFile, None]:
    return model.read_start(data), None


def _read_session(model: LiveModel, data: bytes) -> tuple[StartFile | None, dict[str, Any]]:
    arguments = read_session(model, data)
    file = arguments.get("start_file")
    if file:
        model.num_start_frames(file)
    return file, arguments


ANSWERS = {
    "start": Viewer._start,
    "prompt": Viewer._change,
    "lora": Viewer._change,
    "pause": Viewer._pause,
    "resume": Viewer._pause,
    "shown": Viewer._shown,
    "record": Viewer._record,
    "upload": Viewer._begin_upload,
    "remove": Viewer._remove,
}
# What may be sent in parts: the bytes that it may have, and what reads it.
UPLOADS = {"start_frames": (MAX_BYTES, _read_start), "session": (MAX_SESSION_BYTES, _read_session)}
# What needs no session.
_BEFORE_START = ("start", "upload", "remove")


@dataclass
class Upload:
    """A file of `size` bytes that is coming, what it has, of `UPLOADS`, and what has come of it."""

    size: int
    content: str
    data: bytearray = field(default_factory=bytearray)


class Recording:
    """Every frame of a session from its next block on, to a file. The session waits for it rather than leave one
    out."""

    def __init__(self, viewer: Viewer, session: LiveSession):
        self.viewer, self.session, self.live = viewer, session, viewer.live
        self._blocks: deque[Block] = deque()
        self._something = asyncio.Event()
        self._finished = False
        self._recorder: Recorder | None = None
        self._task = viewer.loop.create_task(self._run())

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
        url, frames = None, 0
        try:
            frames = await self._write()
            url = f"/recordings/{self._recorder.path.stem}.mp4" if frames else None
        except Exception as error:
            logger.error("a recording failed: %s", one_line(error))
            disk = "the server's disk is full, or cannot be written to"
            text = f"the recording has failed: {disk if isinstance(error, OSError) else tell(error)}"
            self.viewer.say({"type": "error", "message": text})
        finally:
            if self.viewer.recording is self:
                self.viewer.recording = None
            self.session.hold(self, False)
            self.live.engine.wake()
        self.viewer.say_recording(url, frames)

    async def _write(self) -> int:
        call = lambda *args: self.viewer.loop.run_in_executor(self.live.recorders, *args)  # noqa: E731
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


def create_app(live: LiveApp, max_viewers: int) -> FastAPI:
    """The ASGI application of a server; the context of `live` has to be entered."""
    # No pages of documentation: they load scripts from elsewhere.
    app = FastAPI(title="astrolabe_diffusers live", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.live, app.state.max_viewers = live, max_viewers
    app.include_router(router)
    app.mount("/static", StaticFiles(directory=PAGE), name="static")

    @app.middleware("http")
    async def check_host(request: Request, call_next):
        if not live.serves(request.headers.get("host", "")):
            return JSONResponse({"error": "this server has another name"}, 403)
        response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    return app


def make_live_server(live: LiveApp, max_connections: int = 64, ping_seconds: float = 5.0):
    """The uvicorn server of it, with bounds for messages and for connections, of viewers and a few more. That a viewer
    has gone without a word is found out after three times `ping_seconds`."""
    return make_server(
        create_app(live, max_connections),
        ConnectionLimits(max_connections + HTTP_CONNECTIONS),
        ws=BoundedWebSocket,
        ws_max_size=MAX_MESSAGE,
        # Frames are compressed, and windows of compression are memory of each connection.
        ws_per_message_deflate=False,
        ws_ping_interval=ping_seconds,
        ws_ping_timeout=2 * ping_seconds,
    )
