"""A server in a thread, and its viewers: one that speaks as the page does, and bare sockets."""

import json
import socket
import struct
import time
from contextlib import contextmanager

import pytest
import requests
import websockets.exceptions
from websockets.sync.client import connect

from astrolabe_diffusers.live.app import LiveApp
from astrolabe_diffusers.live.engine import LiveEngine
from astrolabe_diffusers.live.server import make_live_server
from astrolabe_diffusers.serving.binding import bind
from astrolabe_diffusers.serving.running import in_thread
from tests.pipelines.test_scenes import A


@contextmanager
def serving(model, connections=64, ping_seconds=30.0, engine=None, **settings):
    """A server in a thread; yields its application, with its address as `host`."""
    with LiveApp(model, LiveEngine(**(engine or {})), **settings) as live, bind("127.0.0.1", 0) as listener:
        with in_thread(make_live_server(live, connections, ping_seconds), listener) as live.host:
            yield live


class Client:
    """A viewer who shows each block as soon as it has come, of both lanes if there are two."""

    def __init__(self, live, query="", watches=True, **settings):
        # What a test does not read would let its own end wait.
        settings |= {"max_size": None, "proxy": None, "close_timeout": 0.3}
        self._connection = connect(f"ws://{live.host}/ws{query}", **settings)
        self.socket = self._connection.__enter__()
        self.live, self.watches, self.messages, self.blocks, self.last_lane = live, watches, [], [], 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._connection.__exit__(*error)

    def send(self, kind, **values):
        self.socket.send(json.dumps({"type": kind, **values}))

    def start(self, **values):
        self.send("start", **{"prompt": A, "seed": 0, "codecs": ["webp"], **values})
        return self

    def upload(self, data, **values):
        """Sends a file as the page does, each part when it is asked for; what is said of it."""
        self.send("upload", bytes=len(data), **values)
        for start in range(0, len(data), 2**16):
            self.until("received", bytes=start)
            self.socket.send(data[start : start + 2**16])
        return self.until("start_frames")

    @property
    def session_url(self):
        (*_, path) = [message["session_url"] for message in self.messages if message["type"] == "started"]
        return f"http://{self.live.host}{path}"

    def saved(self):
        """The session, as the page downloads it."""
        return requests.get(self.session_url).json()

    def receive(self, timeout=20.0):
        """A message; the pictures of a block all in one."""
        packets = []
        while True:
            message = self.receive_one(timeout)
            if message["type"] != "picture":
                return message
            packets.append(message["data"])
            if len(packets) == self.num_frames:
                block = {"type": "pictures", "lane": message["lane"], "block": message["block"], "packets": packets}
                self.blocks.append(block | {"first": message["frame"] + 1 - len(packets)})
                if self.watches and message["lane"] == self.last_lane:
                    self.send("shown", frame=message["frame"])
                return self.blocks[-1]

    def receive_one(self, timeout=20.0):
        data = self.socket.recv(timeout)
        if isinstance(data, str):
            message = json.loads(data)
            self.messages.append(message)
            if message["type"] == "started":
                self.last_lane = int(message["compare"])
            elif message["type"] == "block":
                self.num_frames = message["frames"]
            return message
        _, lane, block, frame = struct.unpack_from("<BBxxII", data)
        return {"type": "picture", "lane": lane, "block": block, "frame": frame, "data": data[12:]}

    def until(self, kind, timeout=20.0, **values):
        """The first message of this type, with these values."""
        deadline = time.monotonic() + timeout
        while True:
            message = self.receive(max(deadline - time.monotonic(), 0.01))
            if message["type"] == kind and all(message[name] == value for name, value in values.items()):
                return message


def idle(live):
    return live.engine.running == 0 and not live.viewers


def closed_with(client):
    """The reason for which the server ends a connection, which the page does not try again for."""
    with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
        while True:
            client.receive()
    assert closed.value.rcvd.code == 1008
    return closed.value.rcvd.reason


def connect_raw(live):
    host, port = live.host.split(":")
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.settimeout(10)
    raw.connect((host, int(port)))
    return raw


def connect_silent(live):
    """A connection that is made, and then not read."""
    raw, answer = connect_raw(live), b""
    raw.sendall(handshake(live.host))
    while b"\r\n\r\n" not in answer:
        answer += raw.recv(1)
    assert answer.startswith(b"HTTP/1.1 101")
    return raw


def handshake(host, origin=None):
    lines = [
        "GET /ws HTTP/1.1", f"Host: {host}", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", *([f"Origin: {origin}"] if origin else []),
    ]  # fmt: skip
    return "\r\n".join([*lines, "", ""]).encode()


def masked(text):
    """A text frame of a client, RFC 6455."""
    data = text.encode()
    length = bytes([0x80 | len(data)]) if len(data) < 126 else bytes([0x80 | 126]) + struct.pack(">H", len(data))
    return b"\x81" + length + bytes(4) + data
