"""
One connection: what a viewer asks for goes to the engine, what the engine makes goes to the viewer.

docs/live.md has the messages. Whatever a viewer sends, the answer is a line, and one that is not read costs no memory:
of frames the first block and the newest wait, of words a few.
"""

import asyncio
import json
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect

from ..files.text import parse_json
from .app import LiveApp, tell
from .encoding import make_encoder, pack_picture
from .engine import Ended, Queued
from .model import MAX_SEED, check_whole_number
from .recording import Recording
from .session import Block, LiveSession, Mark
from .upload import Uploads


# Of a connection, messages that come; a page tells of every frame that it shows.
MESSAGES_PER_SECOND = 200
# Of a connection, words that wait to be read, and those that wait to be answered.
_MAX_WAITING = 256
# For which a page may stay on which nothing runs or waits, and nothing is done.
IDLE_SECONDS = 300.0
POLICY_VIOLATION = 1008


class ViewerError(Exception):
    """What a viewer did that ends the connection."""


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
        self.uploads = Uploads(live, self.say)
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
            recording, self.recording = self.recording, None
            if recording:
                await recording.discard()

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
                    self.uploads.receive(message)
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
        arguments = self.uploads.replay if message.get("replay") else self._arguments(message)
        if arguments is None:
            raise ValueError("there is no session to replay: upload one first.")
        self.uploads.replay = None
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
            "start_file": self.uploads.start_file,
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
            self.recording = Recording(self.live, self.session, self._recording_ended)
        self.say_recording()

    async def _upload(self, message: dict[str, Any]):
        self.uploads.begin(message)

    async def _remove(self, message: dict[str, Any]):
        self.uploads.remove()

    def _end_session(self):
        if self.session:
            self.live.engine.remove(self.session)
        self.session = None

    def _end_recording(self):
        recording, self.recording = self.recording, None
        if recording:
            recording.finish()

    def _recording_ended(self, recording: Recording, url: str | None, frames: int, error: str | None):
        if error:
            self.say({"type": "error", "message": error})
        if self.recording is recording:
            self.recording = None
        self.say_recording(url, frames)

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


ANSWERS = {
    "start": Viewer._start,
    "prompt": Viewer._change,
    "lora": Viewer._change,
    "pause": Viewer._pause,
    "resume": Viewer._pause,
    "shown": Viewer._shown,
    "record": Viewer._record,
    "upload": Viewer._upload,
    "remove": Viewer._remove,
}
# What needs no session.
_BEFORE_START = ("start", "upload", "remove")
