"""The server of the page, over real connections."""

import gc
import itertools
import json
import os
import random
import socket
import struct
import threading
import time
from contextlib import ExitStack, contextmanager, suppress

import numpy as np
import psutil
import pytest
import requests
import websockets.exceptions
from PIL import Image
from websockets.sync.client import connect

from astrolabe_diffusers.live import server as server_module
from astrolabe_diffusers.live.encoding import ImageEncoder, Recorder
from astrolabe_diffusers.live.engine import LiveEngine
from astrolabe_diffusers.live.server import LiveApp, make_live_server
from astrolabe_diffusers.live.session import Block, LiveSession, replay
from astrolabe_diffusers.live.start_file import StartFile
from astrolabe_diffusers.serving.binding import bind
from astrolabe_diffusers.serving.running import in_thread
from tests.live.files import picture_file, video_file
from tests.live.helpers import make_model, save_loras
from tests.live.test_encoding import decode
from tests.pipelines.test_scenes import A, B
from tests.training.helpers import full_disk
from tests.waiting import wait_for


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    loras = save_loras(tmp_path_factory.mktemp("loras"))
    return make_model(dict(zip(loras, (1.0, 0.0))))


@contextmanager
def serving(model, connections=64, ping_seconds=30.0, engine=None, **settings):
    """A server in a thread; yields its application, with its address as `host`."""
    with LiveApp(model, LiveEngine(**(engine or {})), **settings) as live, bind("127.0.0.1", 0) as listener:
        with in_thread(make_live_server(live, connections, ping_seconds), listener) as live.host:
            yield live


@pytest.fixture(scope="module")
def live(model):
    with serving(model, engine={"sessions": 2}, presets=[A, B]) as live:
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


@pytest.fixture(autouse=True)
def nothing_left(request):
    yield
    if "live" in request.fixturenames:
        live = request.getfixturevalue("live")
        wait_for(lambda: idle(live), 10)


# What it says


def test_hello(live):
    with Client(live) as client:
        hello = client.until("hello")
    assert hello == {
        "type": "hello", "version": 1, "model": "tiny", "frame_rate": 16, "height": 16, "width": 32,
        "max_pixels": 512, "frames_first_block": 9, "frames_per_block": 12, "num_frames": None,
        "transitions": ["roll", "recache", "flush", "rope_cut", "cut"], "presets": [A, B], "max_transition_blocks": 32,
        "loras": {"first": 1.0, "second": 0.0},
        "codecs": ["h264", "jpeg", "webp"], "sessions": 2,
        "start_media": ["video/quicktime", "video/mp4", "video/webm"], "max_upload": 2**23, "max_session": 2**24,
    }  # fmt: skip


@pytest.mark.parametrize("codec", ["h264", "jpeg", "webp"])
def test_frames_are_the_sessions(live, model, codec):
    with Client(live) as client:
        client.start(seed=4, codecs=[codec])
        started = client.until("started")
        assert (started["seed"], started["height"], started["width"], started["codec"]) == (4, 16, 32, codec)
        assert (started["codec_string"] or "").startswith("avc1." if codec == "h264" else "")
        first = client.until("block")
        client.until("pictures", block=2)
        record = client.saved()
    assert (first["block"], first["first_frame"], first["frames"], first["lane"]) == (0, 0, 9, 0)
    assert first["seconds"] > 0 and first["memory_gb"] > 0.05
    wanted = [blocks[0] for blocks in replay(model, {**record, "num_blocks": 3})]
    for block, sent in zip(wanted, client.blocks[:3], strict=True):
        assert (sent["block"], sent["first"]) == (block.number, block.first_frame)
        assert abs(decode(codec, sent["packets"]).astype(int) - block.frames).mean() < 25


def test_a_picture_is_sent_when_it_is_encoded(live, monkeypatch):
    """Not when all of its block are."""
    come, encode, numbers = threading.Event(), Image.fromarray, itertools.count()

    def wait(frame, *arguments):
        if next(numbers) == 3:  # after the one that every encoder begins with
            come.wait(20)
        return encode(frame, *arguments)

    monkeypatch.setattr(Image, "fromarray", wait)
    with Client(live) as client:
        client.start().until("block", block=0)
        pictures = [client.receive_one(5) for _ in range(2)]
        come.set()
        pictures += [client.receive_one() for _ in range(7)]
    assert [picture["frame"] for picture in pictures] == list(range(9))


def test_both_lanes_of_a_block_are_sent_or_none(live, monkeypatch):
    """Though the encoding is behind: the next block, made before the second lane's turn, comes after it."""
    goes_on, encode, numbers = threading.Event(), Image.fromarray, itertools.count()

    def wait(frame, *arguments):
        if next(numbers) == 2 + 2 * 9:  # both encoders have begun, and both lanes of the first block are through
            goes_on.wait(20)
        return encode(frame, *arguments)

    monkeypatch.setattr(Image, "fromarray", wait)
    with Client(live) as client:
        client.start(compare=True).until("pictures", block=0, lane=1)
        (viewer,) = live.viewers
        wait_for(lambda: viewer.session.num_blocks >= 3)
        goes_on.set()
        client.until("pictures", block=2, lane=1)
    received = [(block["block"], block["lane"]) for block in client.blocks]
    assert received == [(number, lane) for number in range(3) for lane in (0, 1)]


def test_of_codecs_the_servers_best_is_taken(live):
    with Client(live) as client:
        for offered, taken in ((["webp", "av1", "jpeg"], "jpeg"), (["webp", "h264"], "h264"), (None, "h264")):
            client.send("start", prompt=A, **({"codecs": offered} if offered else {}))
            assert client.until("started")["codec"] == taken


def test_steering(live, model):
    with Client(live) as client:
        client.start(compare=True)
        assert client.until("started")["compare"]
        client.until("pictures", block=1, lane=1)
        client.send("prompt", prompt=B, transition="recache", num_blocks=1, id=5)
        mark = client.until("mark", id=5)
        assert mark["event"] == {"type": "prompt", "prompt": B, "transition": "recache", "num_blocks": 1}
        assert mark["block"] > mark["sent_after_block"] >= 1 and mark["seconds"] > 0
        client.send("lora", weights={"first": 0.25})
        later = client.until("mark")
        assert later["block"] > mark["block"]
        client.until("pictures", block=later["block"], lane=1)
        record = client.saved()
    assert [(event["type"], event["block"]) for event in record["events"]] == [
        ("lora", 0), ("prompt", mark["block"]), ("lora", later["block"]),
    ]  # fmt: skip
    # Replayed by another connection, the pictures are the same.
    wanted = {(block["block"], block["lane"]): block["packets"] for block in client.blocks}
    with Client(live) as again:
        names = ("prompt", "seed", "height", "width", "compare", "events")
        again.start(**{name: record[name] for name in names})
        again.until("pictures", block=later["block"], lane=1)
    got = {(block["block"], block["lane"]): block["packets"] for block in again.blocks}
    assert all(wanted[key] == packets for key, packets in got.items() if key in wanted) and len(got) > 6


def test_pause_and_resume(live):
    with Client(live) as client:
        client.start()
        client.until("pictures", block=2)
        client.send("pause")
        with pytest.raises(TimeoutError):
            while True:
                client.receive(timeout=0.5)
        client.send("resume")
        client.until("pictures")


def test_restart_begins_anew(live):
    with Client(live) as client:
        client.start(seed=1)
        client.until("pictures", block=3)
        client.start(seed=2)
        client.until("started", seed=2)
        count = len(client.blocks)
        client.until("pictures", block=1)
        assert [block["block"] for block in client.blocks[count:]] == [0, 1]


# The first block, which may be held back


@pytest.fixture
def delays(monkeypatch):
    """Of first blocks, by the seed of their session."""
    delays = {}
    monkeypatch.setattr(LiveSession, "start_delay", lambda session, *_: delays.get(session.seed, 0.0))
    return delays


def start_held(client, live, **values):
    """With `seed` 1, until two blocks are made."""
    client.start(seed=1, **values).until("started")
    (viewer,) = live.viewers
    wait_for(lambda: viewer.session.num_blocks == 2, 2)


@pytest.mark.parametrize("compare", [False, True])
def test_a_first_block_that_is_held_back_arrives_when_it_is_due(live, delays, compare):
    """In every lane, and the second one, which was made meanwhile, right behind it."""
    delays[1] = 2.0
    lanes = range(1 + compare)
    with Client(live) as client:
        began = time.monotonic()
        start_held(client, live, compare=compare)
        client.until("block", block=0)
        held = time.monotonic() - began
        client.until("pictures", block=1, lane=lanes[-1])
        assert held > 2.0 and time.monotonic() - began - held < 1.9
    received = [(block["lane"], block["block"]) for block in client.blocks]
    assert received == [(lane, number) for number in (0, 1) for lane in lanes]


def test_what_is_no_part_of_the_video_does_not_wait_for_it(live, delays):
    delays[1] = 3.0
    with Client(live) as client:
        start_held(client, live, events=[{"block": 1, "type": "prompt", "prompt": B}])
        began = time.monotonic()
        client.start(height=7).until("error")
        client.saved()
        client.send("upload", bytes=5)
        client.until("received")
        count = len(client.messages)
        client.start(seed=2).until("started", seed=2)
        assert time.monotonic() - began < 1.5 and not client.blocks
        # What was left to say of the video before comes before the new one, and nothing of it later.
        assert [message["type"] for message in client.messages[count:]] == ["mark", "queue", "started"]
        client.until("pictures", block=2)
        assert [block["block"] for block in client.blocks] == [0, 1, 2]
        assert "mark" not in [message["type"] for message in client.messages[count + 3 :]]


def test_marks_and_the_end_do_not_overtake_their_blocks(delays):
    delays[1] = 2.0
    with serving(make_model(num_frames=21)) as live, Client(live, watches=False) as client:
        start_held(client, live, events=[{"block": i, "type": "prompt", "prompt": B} for i in (0, 1)])
        client.send("shown", frame=20)
        wait_for(lambda: live.engine.running == 0, 1)
        said = []
        while said[-1:] != ["ended"]:
            said.append(client.receive()["type"])
    assert said == [*["mark", "block", "pictures"] * 2, "ended"]


def test_a_video_that_cannot_be_sent_ends_once(live, delays, monkeypatch):
    """Though several of its blocks wait."""

    def fail(self, frames):
        yield b"no picture"
        raise RuntimeError("no")

    delays[1] = 1.0
    with Client(live) as client:
        start_held(client, live, compare=True)
        with monkeypatch.context() as patch:
            patch.setattr(ImageEncoder, "encode", fail)
            client.until("ended")
            with pytest.raises(TimeoutError):
                client.receive(0.5)
        client.start(seed=2).until("pictures", block=2)


def test_the_queue_says_which_start_it_is_of(model):
    with serving(model, engine={"sessions": 1}) as live, ExitStack() as stack:
        first, second = (stack.enter_context(Client(live)) for _ in range(2))
        first.start().until("started")
        second.start(height=7)
        second.until("error")
        assert second.start().until("queue")["start"] == 2
        second.start(height=7)
        second.until("error")
        first.socket.close()
        assert second.until("queue", position=0)["start"] == 2


# Who may


def test_a_token_is_asked_for(model):
    with serving(model, token="secret") as live:
        for query in ("", "?token=wrong", "?token="):
            with Client(live, query) as client:
                assert client.receive()["message"].startswith("this server wants its token")
                with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
                    client.receive()
                assert closed.value.rcvd.code == 1008
        with Client(live, "?token=secret") as client:
            assert client.receive()["type"] == "hello"
        for path, status in (("/health", 200), ("/", 200), ("/recordings/a.mp4", 401), ("/sessions/a.json", 401)):
            assert requests.get(f"http://{live.host}{path}").status_code == status
        # With a token a server may have any name.
        assert requests.get(f"http://{live.host}/", headers={"Host": "my.host:80"}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "http://[", "file://"])
def test_pages_of_others_are_refused(live, origin):
    with pytest.raises(websockets.exceptions.InvalidStatus, match="403"):
        Client(live, additional_headers={"Origin": origin})


def test_its_own_page_is_served(live):
    with Client(live, additional_headers={"Origin": f"http://{live.host}"}) as client:
        assert client.receive()["type"] == "hello"


def test_a_name_that_was_made_to_mean_this_machine_is_refused(live):
    """DNS rebinding: page and socket have the same name, which is not this machine's."""
    for host in ("evil.example", "evil.example:7860", "["):
        assert requests.get(f"http://{live.host}/health", headers={"Host": host}).status_code == 403
    for name in ("localhost", "127.0.0.1", "[::1]"):
        assert requests.get(f"http://{live.host}/health", headers={"Host": f"{name}:80"}).status_code == 200
    with connect_raw(live) as raw:
        raw.sendall(handshake("evil.example", "http://evil.example"))
        assert raw.recv(4096).startswith(b"HTTP/1.1 403")


def test_the_page_loads_nothing_from_elsewhere(live):
    answer = requests.get(f"http://{live.host}/")
    assert "<html" in answer.text and "default-src 'self'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert requests.get(f"http://{live.host}/static/../server.py").status_code == 404
    assert requests.get(f"http://{live.host}/static/%2e%2e/server.py").status_code == 404
    assert requests.get(f"http://{live.host}/docs").status_code == 404


# What viewers get wrong


@pytest.mark.parametrize(
    "sent,message",
    [
        ("nonsense", "the message is no JSON"),
        ("[" * 60_000, "nested too deeply"),
        ("[]", "one of start, prompt, lora, pause, resume, shown, record, upload"),
        ('{"type": {}}', "the type of a message"),
        (b"bytes", "a message is a text"),
        ('{"type": "pause"}', "start one first"),
        ('{"type": "start"}', "prompt must be text"),
        ('{"type": "start", "prompt": "a", "codecs": "h264"}', "codecs must be a list with one of h264, jpeg, webp"),
        ('{"type": "start", "prompt": "a", "codecs": ["av1", {}]}', "codecs must be a list"),
        ('{"type": "start", "prompt": "a", "seed": 1e400}', "seed must be a whole number"),
        ('{"type": "start", "prompt": "a [b] c"}', "character 3"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(live, sent, message):
    with Client(live) as client:
        client.socket.send(sent)
        error = client.until("error")["message"]
        assert message in error and "\n" not in error
        client.start()
        client.until("pictures")


def test_what_is_wrong_changes_nothing(live):
    with Client(live) as client:
        client.start()
        for kind, values, message in (
            ("prompt", {"prompt": "x", "transition": "fade"}, "must be one of"),
            ("lora", {"weights": {"third": 1}}, "no LoRA 'third'; there are first, second"),
            ("shown", {"frame": -1}, "frame must be a whole number"),
            ("record", {"on": "yes"}, "on must be true or false"),
            ("start", {"prompt": A, "height": 7}, "multiple of 16"),
        ):
            client.send(kind, **values)
            assert message in client.until("error")["message"]
        block = client.blocks[-1]["block"] if client.blocks else 0
        client.until("pictures", block=block + 3)
        assert [event["type"] for event in client.saved()["events"]] == ["lora"]


def test_markup_in_a_prompt_is_text(live):
    text = "<img src=x onerror=alert(1)> <script>alert(1)</script>"
    with Client(live) as client:
        client.start()
        client.send("prompt", prompt=text)
        assert client.until("mark")["event"]["prompt"] == text
        assert client.saved()["events"][-1]["prompt"] == text


def test_a_message_that_is_too_long_ends_the_connection(live):
    with Client(live) as client:
        client.start()
        client.until("pictures")
        client.socket.send("x" * (2**16 + 1))
        with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
            client.until("error")
        assert closed.value.rcvd.code == 1009


def test_a_flood_ends_the_connection(live):
    with Client(live) as client, pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
        client.start()
        for _ in range(5000):
            client.send("shown", frame=0)
        client.until("never")
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1008, "more than 200 messages a second")


def test_an_error_of_the_servers_own_is_a_line_too(live, monkeypatch, caplog):
    """The connection stays, and so does the video that runs."""

    def fail(*_):
        raise RuntimeError("the encoder\ncannot")

    with Client(live) as client:
        client.start().until("pictures")
        with monkeypatch.context() as patch:
            patch.setattr(server_module, "make_encoder", fail)
            client.start(seed=1)
            assert client.until("error")["message"] == "the encoder cannot"
        assert "RuntimeError: the encoder cannot" in caplog.text
        with monkeypatch.context() as patch:
            patch.setattr(StartFile, "read", fail)
            assert client.upload(b"GIF")["error"] == "the encoder cannot"
        client.until("pictures", block=client.blocks[-1]["block"] + 2)
        # While frames are encoded: that video ends, and another one can be started.
        with monkeypatch.context() as patch:
            patch.setattr(ImageEncoder, "encode", lambda self, frames: (fail() if i else b"" for i in range(2)))
            assert client.until("ended")["reason"] == "its frames cannot be sent as webp: the encoder cannot"
            wait_for(lambda: live.engine.running == 0)
        client.start().until("pictures", block=2)


def test_random_messages_do_no_harm(live):
    """Types and fields that exist, with values that do not fit, and bytes of all kinds."""
    chance = random.Random(0)
    values = [None, True, -1, 0, 5, 10**30, 1e308, "", "a", A, [], [1], {}, {"first": 1}, {"first": None}, "\0", "[#]"]
    fields = "prompt seed height width codecs compare events transition num_blocks weights frame on".split()
    fields += ["bytes", "strength", "replay", "content"]
    kinds = [*server_module.ANSWERS, "hello", None]
    with Client(live, watches=False) as good:
        good.start()
        good.until("pictures", block=1)
        for _ in range(8):
            with Client(live, watches=False) as client:
                for _ in range(40):
                    message = {"type": chance.choice(kinds)}
                    message |= {chance.choice(fields): chance.choice(values) for _ in range(4)}
                    client.socket.send(json.dumps(message) if chance.random() < 0.8 else chance.randbytes(40))
        for frames in (8, 20, 32):
            good.send("shown", frame=frames)
        good.until("pictures", block=2)
        good.until("pictures", block=3)


# What a video starts from


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """A file of 25 frames and more parts than one."""
    words = ("-vf", "noise=alls=60:allf=t", "-crf", "10")
    data = video_file(tmp_path_factory.mktemp("start") / "video.mp4", 25, 128, 128, *words).read_bytes()
    assert 2**16 < len(data) < 2**20
    return data


@pytest.fixture
def decoding(monkeypatch):
    """Lets the decoder of files wait; one that gets `go` goes on, and with `started` it says that it is there."""

    class Decoding:
        started, go = threading.Semaphore(0), threading.Semaphore(0)

    read = StartFile.read

    def wait(data):
        Decoding.started.release()
        assert Decoding.go.acquire(timeout=60)
        return read(data)

    monkeypatch.setattr(StartFile, "read", wait)
    return Decoding


def pictures_of(client, blocks):
    """Of the first ones, as they were sent."""
    client.until("started")
    client.blocks.clear()
    client.until("pictures", block=blocks - 1)
    return [block["packets"] for block in client.blocks]


def test_a_file_that_is_sent_is_what_the_next_video_starts_from(live, model, video):
    """From then on every one, until it is removed."""
    wanted = [blocks[0].frames for blocks in replay(model, {**record_of(live, video), "num_blocks": 3})]
    with Client(live) as client:
        plain = pictures_of(client.start(), 3)
        said = client.upload(video)
        thumbnail = said.pop("thumbnail")
        assert said == {"type": "start_frames", "media": "video/mp4", "frames": 21, "error": None}
        assert thumbnail.startswith("data:image/jpeg;base64,") and len(thumbnail) < 40_000
        for _ in range(2):
            sent = pictures_of(client.start(), 3)
            assert all(abs(decode("webp", p).astype(int) - w).mean() < 25 for p, w in zip(sent, wanted, strict=True))
            assert sent != plain
        client.send("remove")
        assert client.until("start_frames")["media"] is None
        assert pictures_of(client.start(), 3) == plain
        assert client.saved()["start_frames"] is None


def record_of(live, video):
    with Client(live) as client:
        client.upload(video)
        client.start().until("started")
        record = client.saved()
    assert record["start_frames"] == StartFile.read(video).uri
    return record


def test_a_picture_for_a_model_with_blocks_of_one():
    model = make_model(config={"num_frames_per_block": 1})
    with serving(model) as live, Client(live) as client:
        assert client.until("hello")["start_media"][:3] == ["image/jpeg", "image/png", "image/webp"]
        said = client.upload(picture_file("JPEG"))
        assert (said["media"], said["frames"], said["error"]) == ("image/jpeg", 1, None)
        client.start().until("pictures", block=3)
        record = client.saved()
    wanted = [blocks[0].frames for blocks in replay(model, {**record, "num_blocks": 4})]
    assert [len(frames) for frames in wanted] == [1, 4, 4, 4]
    for block, frames in zip(client.blocks[:4], wanted, strict=True):
        assert abs(decode("webp", block["packets"]).astype(int) - frames).mean() < 25
    assert record["start_frames"] == StartFile.read(picture_file("JPEG")).uri


def test_a_start_with_a_strength(live, video):
    with Client(live) as client:
        client.start(strength=0.5)
        assert "needs a video to start from" in client.until("error")["message"]
        client.upload(video)
        client.start(strength=0.5)
        assert client.until("ended")["reason"] == "the video has come to its end"
        assert sum(len(block["packets"]) for block in client.blocks) == 21
        assert client.saved()["strength"] == 0.5


def test_a_file_that_is_looked_at_lets_nobody_wait(live, video, decoding):
    """Not the video that runs, nor those of others; and it comes to the next one alone."""
    with Client(live) as client, Client(live) as other:
        client.start().until("pictures"), other.start().until("pictures")
        client.send("upload", bytes=len(video))
        for start in range(0, len(video), 2**16):
            client.until("received", bytes=start)
            client.socket.send(video[start : start + 2**16])
        assert decoding.started.acquire(timeout=20)
        for viewer in (client, other):
            viewer.until("pictures", block=viewer.blocks[-1]["block"] + 3)
        for kind, values in (("upload", {"bytes": 5}), ("remove", {})):
            client.send(kind, **values)
            assert "the file before is still looked at" in client.until("error")["message"]
        client.start(seed=8).until("started", seed=8)
        assert client.saved()["start_frames"] is None
        decoding.go.release()
        assert client.until("start_frames")["frames"] == 21
        client.until("pictures", block=client.blocks[-1]["block"] + 2)
        assert client.saved()["start_frames"] is None
        client.start(seed=9).until("pictures", block=2)
        assert client.saved()["start_frames"].startswith("data:video/mp4;base64,")


def as_file(record, **values):
    return json.dumps({**record, **values}, indent=1).encode()


def test_a_long_session_is_replayed(live, video):
    """One of more bytes than a message may have, with its file, in both lanes and to its end."""
    with Client(live) as client:
        client.upload(video)
        client.start(seed=5, compare=True)
        client.until("started")
        for number in range(1, 4):
            client.send("prompt", prompt=f"{B} {number}", transition="recache")
            client.send("lora", weights={"first": 0.25 * number})
            client.until("mark")
            client.until("pictures", block=client.blocks[-1]["block"] + 1 if client.blocks else 1, lane=1)
        last = client.blocks[-1]["block"]
        record = client.saved()
    later = [{"block": 10**6 + i, "type": "lora", "weights": {"first": 0.5}} for i in range(5000)]
    wanted = {(block["block"], block["lane"]): block["packets"] for block in client.blocks}
    with Client(live) as again:
        data = as_file(record, events=[*record["events"], *later])
        assert len(data) > 2**18
        assert again.upload(data, content="session")["frames"] == 21
        again.send("start", replay=True, codecs=["webp"])
        assert again.until("started")["seed"] == 5
        again.until("pictures", block=last, lane=1)
        got = {(block["block"], block["lane"]): block["packets"] for block in again.blocks}
        assert all(wanted[key] == packets for key, packets in got.items() if key in wanted) and len(got) > 6
        assert again.saved()["start_frames"] == record["start_frames"]
        # A LoRA that it was made without has weight 0.
        without = as_file(record, loras={"second": record["loras"]["second"]}, events=[], compare=False)
        assert again.upload(without, content="session")["error"] is None
        again.send("start", replay=True, codecs=["webp"])
        assert again.until("started", compare=False)["loras"] == {"first": 0.0, "second": 0.0}
        # Once; a restart is the page's own.
        again.send("start", replay=True)
        assert again.until("error")["message"] == "there is no session to replay: upload one first."


def test_a_large_session_is_saved_beside_the_video(model, monkeypatch):
    """However slowly it is taken: pictures go on, and pings. When the viewer has left it is gone."""
    record = LiveSession.record
    monkeypatch.setattr(LiveSession, "record", lambda self: record(self) | {"start_frames": "A" * 2**24})
    with serving(model, ping_seconds=0.5) as live:
        with Client(live) as client:
            client.start(seed=3).until("pictures")
            url = client.session_url
            with requests.get(url, stream=True) as answer:
                assert answer.headers["Content-Disposition"] == 'attachment; filename="session-3.json"'
                parts = answer.iter_content(2**20)
                data = next(parts)
                for _ in range(8):
                    client.until("pictures", block=client.blocks[-1]["block"] + 2)
                    data += next(parts)
                    time.sleep(0.3)
                data += b"".join(parts)
            saved = json.loads(data)
            assert (saved["seed"], len(saved["start_frames"])) == (3, 2**24)
            assert requests.get(url.replace("/sessions/", "/sessions/a")).status_code == 404
        wait_for(lambda: idle(live), 10)
        assert requests.get(url).status_code == 404


def test_sessions_that_are_not_this_models_are_refused(live):
    with Client(live) as client:
        client.start().until("started")
        record = client.saved()
        for values, message in (
            ({"weights": "0" * 16}, "it was made with other weights than those of tiny: give its model."),
            ({"loras": {"first": "0" * 16}}, "it was made with the LoRA first: load that one, and under this name."),
            ({"dtype": "bfloat16"}, "it was made in bfloat16, not float32: give that dtype."),
            ({"start_frames": "a.mp4"}, "start_frames must be a data URI in base64."),
        ):
            assert client.upload(as_file(record, **values), content="session")["error"] == message
        assert "the file is no JSON" in client.upload(b"\xff{}", content="session")["error"]
        assert "it is no session, which has" in client.upload(b"[]", content="session")["error"]
        for values, message in (
            ({"bytes": 2**24 + 1}, "bytes must be a whole number from 1 to 16777216."),
            ({"content": "video"}, "content must be one of start_frames, session."),
            ({"content": []}, "content must be one of start_frames, session."),
        ):
            client.send("upload", **{"bytes": 5, "content": "session", **values})
            assert client.until("error")["message"] == message
        # What is wrong in what it starts with is said at the start, and the video that runs goes on.
        assert client.upload(as_file(record, seed=-1), content="session")["error"] is None
        client.send("start", replay=True)
        assert "seed must be a whole number" in client.until("error")["message"]
        client.until("pictures", block=client.blocks[-1]["block"] + 2 if client.blocks else 2)


@pytest.fixture
def long_start(monkeypatch):
    """A start with seed 77 takes until `go` is set; with `begun` it says that it is there."""

    class LongStart:
        begun, go = threading.Event(), threading.Event()

    make = LiveSession.__post_init__

    def wait(self):
        if self.seed == 77:
            LongStart.begun.set()
            assert LongStart.go.wait(60)
        make(self)

    monkeypatch.setattr(LiveSession, "__post_init__", wait)
    yield LongStart
    LongStart.go.set()


def test_a_start_that_takes_long_lets_nobody_wait(live, long_start):
    """Of thousands of events, or scenes: others are shown what is made, and are answered."""
    with Client(live) as client, Client(live) as other:
        other.start().until("pictures")
        client.start(seed=77)
        assert long_start.begun.wait(20)
        other.until("pictures", block=other.blocks[-1]["block"] + 3)
        other.saved()
        long_start.go.set()
        client.until("pictures", block=2)


def test_a_start_that_takes_long_ends_no_connection(model, long_start):
    """Nor the video before, for which pings and messages are read on."""
    with serving(model, ping_seconds=0.5) as live, Client(live, watches=False) as client:
        client.start().until("pictures", block=1)
        client.start(seed=77)
        assert long_start.begun.wait(20)
        began = time.monotonic()
        for number in range(2, 12):
            client.send("shown", frame=client.blocks[-1]["first"] + len(client.blocks[-1]["packets"]) - 1, start=1)
            client.until("pictures", block=number)
            time.sleep(0.3)
        assert time.monotonic() - began > 4 * 0.5
        # What has no number is about the video that is to come.
        client.send("lora", weights={"first": 0.25})
        client.send("prompt", prompt=B)
        long_start.go.set()
        assert client.until("started")["start"] == 2
        assert client.until("mark")["event"]["prompt"] == B
        assert client.saved()["events"][0]["weights"]["first"] == 0.25


def test_who_leaves_while_a_start_takes_long_is_gone(model, long_start, caplog):
    """And a server that ends does not wait for it."""
    with LiveApp(model, LiveEngine()) as live, bind("127.0.0.1", 0) as listener:
        with in_thread(make_live_server(live), listener) as live.host:
            for leaves in (True, False):
                client = Client(live).start(seed=77)
                assert long_start.begun.wait(20)
                long_start.begun.clear()
                if leaves:
                    client.socket.socket.shutdown(socket.SHUT_RDWR)
                    wait_for(lambda: not live.viewers, 5)
            began = time.monotonic()
        assert time.monotonic() - began < 5 and not caplog.text
        long_start.go.set()


def test_what_is_about_another_start_is_dropped(live):
    """A pause that was pressed, and frames that were shown, before the next video was there."""
    with Client(live, watches=False) as client:
        client.start().until("pictures", block=1)
        client.start(seed=1).until("started", start=2)
        client.send("pause", start=1)
        client.send("shown", frame=8, start=1)
        client.send("pause", start=3)
        client.until("pictures", block=1)
        with pytest.raises(TimeoutError):
            client.until("pictures", timeout=1.0, block=2)
        client.send("shown", frame=8, start=2)
        client.until("pictures", block=2)
        for start in (0, "1", None, True):
            client.send("pause", start=start)
            assert "start must be a whole number" in client.until("error")["message"]
        client.send("remove", start=2)
        assert client.until("error")["message"] == "a message of type remove has no start."


def test_files_that_are_wrong_leave_the_one_before(live, video, tmp_path):
    short = video_file(tmp_path / "short.mp4", 5).read_bytes()
    with Client(live) as client:
        for data, message in (
            (b"<svg onload=alert(1)>", "one of image/jpeg, image/png"),
            (picture_file(), "a picture is one frame, but the first block of this model has 9"),
            (video[: len(video) // 2], "this video/mp4 cannot be used"),
            (short, "of the file's 5 only 5 can be given"),
        ):
            said = client.upload(data)
            assert message in said["error"] and "\n" not in said["error"]
            assert said["media"] is said["frames"] is said["thumbnail"] is None
        client.upload(video)
        said = client.upload(short)
        assert said["error"] and (said["media"], said["frames"]) == ("video/mp4", 21)
        client.start().until("pictures", block=1)


def test_an_upload_is_as_long_as_it_says(live, video):
    with Client(live) as client:
        for size in (2**23 + 1, 0, -1, 1.5, "5", True, None):
            client.send("upload", bytes=size)
            assert client.until("error")["message"] == "bytes must be a whole number from 1 to 8388608."
        client.socket.send(b"more")
        assert "bytes come after an upload" in client.until("error")["message"]
        client.send("upload", bytes=5)
        client.until("received")
        client.socket.send(b"sixsix")
        assert client.until("error")["message"] == "6 bytes came of a file of 5."
        client.socket.send(b"more")
        assert "bytes come after an upload" in client.until("error")["message"]
        assert client.upload(video)["frames"] == 21


def test_two_uploads_at_once(live, video, tmp_path):
    """Of one viewer the later one counts; those of two do not touch."""
    nine = video_file(tmp_path / "nine.mp4", 9).read_bytes()
    with Client(live) as client, Client(live) as other:
        for viewer, data in ((client, video), (other, nine)):
            viewer.send("upload", bytes=len(data))
            viewer.until("received")
        client.socket.send(video[: 2**16])
        client.until("received", bytes=2**16)
        other.socket.send(nine)
        assert other.until("start_frames")["frames"] == 9
        assert client.upload(nine)["frames"] == 9
        assert client.upload(video)["frames"] == 21
        client.send("upload", bytes=50)
        client.until("received")
        client.send("remove")
        assert client.until("start_frames")["media"] is None
        client.socket.send(bytes(50))
        assert "bytes come after an upload" in client.until("error")["message"]


def test_no_more_files_wait_than_may(live, video, decoding, monkeypatch):
    monkeypatch.setattr(server_module, "_MAX_CHECKS", 1)
    with ExitStack() as stack:
        first, second = (stack.enter_context(Client(live)) for _ in range(2))
        for client in (first, second):
            client.send("upload", bytes=5)
            client.until("received")
        first.socket.send(b"first")
        assert decoding.started.acquire(timeout=20)
        second.socket.send(b"later")
        assert second.until("start_frames")["error"] == "too many files wait to be looked at: try again."
        decoding.go.release()
        assert "this is none of them" in first.until("start_frames")["error"]
        decoding.go.release()
        assert "this is none of them" in second.upload(b"later")["error"]
    assert live.num_checks == 0


def test_who_leaves_within_an_upload_leaves_nothing(model, video, decoding):
    """While it comes, while it is looked at, with a file, and with a video that started from it."""

    def left():
        gc.collect()
        kinds = [type(x).__name__ for x in gc.get_objects()]
        return sum(kinds.count(name) for name in ("Viewer", "Upload", "StartFile", "LiveSession"))

    with serving(model, engine={"sessions": 2}) as live:
        before = left()
        for last in ("received", "looked at", "start_frames", "pictures"):
            with Client(live) as client:
                client.send("upload", bytes=len(video))
                client.until("received")
                client.socket.send(video[: 2**16])
                client.until("received", bytes=2**16)
                if last != "received":
                    for start in range(2**16, len(video), 2**16):
                        client.socket.send(video[start : start + 2**16])
                    assert decoding.started.acquire(timeout=20)
                if last in ("start_frames", "pictures"):
                    decoding.go.release()
                    client.until("start_frames")
                if last == "pictures":
                    client.start().until("pictures")
                client.socket.socket.shutdown(socket.SHUT_RDWR)
            if last == "looked at":
                decoding.go.release()
            client = None
            wait_for(lambda: idle(live) and live.num_checks == 0, 20)
            wait_for(lambda: left() == before, 10)


# Many, slow and gone


def test_three_on_one_slot(model):
    with serving(model) as live, ExitStack() as stack:
        first = stack.enter_context(Client(live)).start(seed=0)
        # Who asks at the same time may come first.
        assert first.until("queue") == {"type": "queue", "position": 0, "sessions": 1, "start": 1}
        second, third = (stack.enter_context(Client(live)).start(seed=i) for i in (1, 2))
        first.until("pictures")
        assert [second.until("queue")["position"], third.until("queue")["position"]] in ([1, 2], [2, 1])
        second, third = sorted((second, third), key=lambda client: client.messages[-1]["position"])
        first.socket.close()
        began = time.monotonic()
        assert second.until("queue")["position"] == 0
        second.until("pictures")
        assert time.monotonic() - began < 3
        assert third.until("queue")["position"] == 1
        with pytest.raises(TimeoutError):
            third.receive(0.3)
        # A reload: the page is gone and comes again, behind those who wait.
        second.socket.close()
        again = stack.enter_context(Client(live)).start()
        third.until("pictures")
        assert again.until("queue")["position"] == 1


def test_no_more_may_wait_than_there_are_places(model):
    with serving(model, engine={"waiting": 1}) as live, ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(Client(live)).start().until("queue")
        late = stack.enter_context(Client(live)).start()
        assert late.until("error")["message"] == "1 viewers are waiting already: come again later."


def closed_with(client):
    """The reason for which the server ends a connection, which the page does not try again for."""
    with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
        while True:
            client.receive()
    assert closed.value.rcvd.code == 1008
    return closed.value.rcvd.reason


def test_a_page_that_is_left_open_makes_room(model, monkeypatch):
    """One without a video, and one whose video has ended, but not one that is paused."""
    monkeypatch.setattr(server_module, "IDLE_SECONDS", 1.5)
    short = make_model(num_frames=21)
    with serving(short, engine={"sessions": 2}) as live, ExitStack() as stack:
        paused, idle, ended = (stack.enter_context(Client(live)) for _ in range(3))
        paused.start().until("pictures")
        paused.send("pause")
        ended.start().until("ended")
        wait_for(lambda: len(live.viewers) == 1, 10)
        for client in (idle, ended):
            assert "nothing ran for" in closed_with(client) and "reload the page" in client.messages[-1]["message"]
        paused.saved()
        # Something is done: it stays.
        with Client(live) as busy:
            for _ in range(6):
                busy.send("remove")
                busy.until("start_frames")
                time.sleep(0.5)


def test_pages_of_a_full_server(model):
    with serving(model, connections=2) as live, ExitStack() as stack:
        first, _ = (stack.enter_context(Client(live)) for _ in range(2))
        wait_for(lambda: len(live.viewers) == 2)
        with Client(live) as third:
            assert closed_with(third) == "2 pages are open already, and there may be no more: reload it later"
        assert requests.get(f"http://{live.host}/health").status_code == 200
        first.socket.close()
        wait_for(lambda: len(live.viewers) == 1)
        with Client(live) as third:
            assert third.until("hello")


def test_fifty_at_once(model):
    with serving(model, connections=60, engine={"sessions": 2, "waiting": 20}) as live:
        outcomes = []

        def visit(number):
            with Client(live) as client:
                client.start(seed=number)
                while (outcome := client.receive(60)["type"]) not in ("pictures", "error"):
                    pass
                outcomes.append(outcome)

        threads = [threading.Thread(target=visit, args=(number,)) for number in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(90)
        assert len(outcomes) == 50 and outcomes.count("pictures") >= 22
        wait_for(lambda: idle(live))
        with Client(live) as client:
            client.start().until("pictures", block=2)


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


def test_who_does_not_read_loses_frames_and_costs_no_memory(model, monkeypatch):
    """A client that says it has shown everything and reads nothing, in a server whose frames are large."""
    monkeypatch.setattr(server_module.BoundedWebSocket, "seconds", 2.0)
    big = make_model(max_pixels=256 * 256)
    with serving(big, engine={"sessions": 2}) as live, Client(live) as good:
        good.start()
        raw = connect_silent(live)
        raw.sendall(masked(json.dumps({"type": "start", "prompt": A, "seed": 0, "height": 256, "width": 256,
                                       "codecs": ["jpeg"]})))  # fmt: skip
        wait_for(lambda: live.engine.running == 2)
        (slow,) = [viewer for viewer in live.viewers if viewer.session and viewer.session.height == 256]
        session, held, made = slow.session, [], 0
        began = time.monotonic()
        while slow in live.viewers:
            assert time.monotonic() - began < 60
            with_frames = session.num_frames
            if with_frames:
                try:
                    raw.sendall(masked(json.dumps({"type": "shown", "frame": with_frames - 1})))
                except OSError:
                    break
            held.append(sum(item.frames.nbytes if isinstance(item, Block) else 1 for _, item in slow._outbox))
            made = max(made, session.num_blocks)
            good.receive(5)
            time.sleep(0.02)
        assert made > 6  # the engine went on
        assert max(held) <= 12 * 256 * 256 * 3 + 300  # one block waits, whatever was made
        good.until("pictures", block=good.blocks[-1]["block"] + 3)
        wait_for(lambda: live.engine.running == 1, 10)
        raw.close()


def test_words_that_are_not_read_end_the_connection(model, monkeypatch):
    monkeypatch.setattr(server_module, "MESSAGES_PER_SECOND", 10_000)
    monkeypatch.setattr(server_module.BoundedWebSocket, "seconds", 1.0)
    with serving(model) as live:
        raw = connect_silent(live)
        raw.sendall(masked(json.dumps({"type": "start", "prompt": "a" * 4000, "seed": 0})))
        wait_for(lambda: live.viewers)
        (viewer,) = live.viewers
        most, deadline = 0, time.monotonic() + 20
        with suppress(OSError):  # the connection may be gone before the viewer is
            while viewer in live.viewers:
                assert time.monotonic() < deadline
                raw.sendall(masked(json.dumps({"type": "lora", "weights": {"a" * 400: 1}})) * 10)
                time.sleep(0.002)
                most = max(most, len(viewer._outbox))
        assert 0 < most <= 256 + 1  # words, and the turn of a block
        wait_for(lambda: idle(live), 10)
        raw.close()


def test_who_has_gone_without_a_word_is_found_out(model):
    """No answer to a ping, and no end of the connection: a cable that was pulled."""
    with serving(model, ping_seconds=0.5) as live:
        raw = connect_silent(live)
        raw.sendall(masked(json.dumps({"type": "start", "prompt": A, "seed": 0})))
        wait_for(lambda: live.engine.running == 1)
        wait_for(lambda: idle(live), 5)
        raw.close()


def test_twenty_visits_leave_nothing(model):
    with serving(model, engine={"sessions": 2}) as live:

        def visit(number):
            with Client(live) as client:
                client.start(seed=number, compare=number % 3 == 0, codecs=[("h264", "jpeg", "webp")[number % 3]])
                if number % 4 == 0:
                    client.send("record", on=True)
                client.until("pictures", block=1)
                if number % 2:  # without a word
                    client.socket.socket.shutdown(socket.SHUT_RDWR)

        def left():
            gc.collect()
            kinds = [type(x).__name__ for x in gc.get_objects()]
            wanted = ("BlockGenerator", "LiveSession", "Viewer", "Recorder", "CausalWanStream")
            return {name: kinds.count(name) for name in wanted}, {thread.name for thread in threading.enumerate()}

        for number in range(6):
            visit(number)
        wait_for(lambda: idle(live))
        # ffmpeg of a recording that was broken off takes its moment to end.
        children = psutil.Process().children
        wait_for(lambda: not os.listdir(live._folder.name))
        before, processes = left(), {child.pid for child in children(recursive=True)}
        for number in range(20):
            visit(number)
        wait_for(lambda: idle(live))
        wait_for(lambda: {child.pid for child in children(recursive=True)} <= processes, 10)
        wait_for(lambda: not os.listdir(live._folder.name), 10)
        wait_for(lambda: not any(left()[0].values()), 10)
        # Pools have as many threads as they may, some of them perhaps only now.
        pools = {f"live-{kind}_{i}" for kind in ("encode", "record") for i in range(live.engine.sessions + 1)}
        assert left()[1] - pools <= before[1]


# Recordings


def test_a_recording_is_every_frame_and_the_replay_its_equal(live, model):
    import imageio.v3

    with Client(live) as client:
        client.start(seed=3)
        client.send("record", on=True)
        assert client.until("recording") == {"type": "recording", "on": True, "url": None, "frames": 0}
        client.until("pictures", block=3)
        client.send("prompt", prompt=B, transition="cut")
        client.until("pictures", block=6)
        client.send("record", on=False)
        recording = client.until("recording")
        record = client.saved()
    answer = requests.get(f"http://{live.host}{recording['url']}")
    assert answer.status_code == 200 and answer.headers["Content-Type"] == "video/mp4"
    video = imageio.v3.imread(answer.content, extension=".mp4")
    made = np.concatenate([blocks[0].frames for blocks in replay(model, record)])
    # From the next block on: it begins with one of the first, and each frame comes once.
    assert len(video) == recording["frames"] >= 40
    starts = [0, 9, 21]
    made = np.concatenate([made, made[:21]])  # so that every beginning can be tried
    errors = [abs(video.astype(int) - made[start : start + len(video)]).mean() for start in starts]
    assert min(errors) < 15 and sorted(errors)[1] > min(errors) + 1
    assert requests.get(f"http://{live.host}/recordings/none.mp4").status_code == 404


def test_that_it_records_is_always_said(live):
    with Client(live) as client:
        client.start().until("pictures")
        states = []
        for on in (False, True, True, False, False):
            client.send("record", on=on)
            states.append(client.until("recording")["on"])
            if states[-1]:
                client.until("pictures", block=client.blocks[-1]["block"] + 2)
        assert states == [False, True, True, False, False]
        # A restart ends one that has no frame yet, and a new one is not the old one.
        client.send("pause")
        time.sleep(0.5)  # the block that is being made still comes
        client.send("record", on=True)
        assert client.until("recording")["on"]
        client.start(seed=1)
        client.send("record", on=True)
        first, second = client.until("recording"), client.until("recording")
        assert second["on"] and first["url"] is second["url"] is None
        client.until("pictures", block=2)
        client.send("record", on=False)
        ended = client.until("recording")
        assert not ended["on"] and ended["frames"] >= 9 and ended["url"]


def test_a_recording_that_is_slow_is_waited_for(live, monkeypatch):
    """Two of them, the one beside the end of the other: few blocks wait, and the files have every frame."""
    write, behind, written = Recorder.write, [], {}

    def slow(self, frames):
        time.sleep(0.3)
        written.setdefault(self.path, []).append(len(frames))
        write(self, frames)

    add = server_module.Recording.add

    def watch(self, block):
        add(self, block)
        behind.append(len(self._blocks))

    monkeypatch.setattr(Recorder, "write", slow)
    monkeypatch.setattr(server_module.Recording, "add", watch)
    with Client(live) as client:
        client.start().until("pictures")
        for _ in range(2):
            client.send("record", on=True)
            client.until("pictures", block=client.blocks[-1]["block"] + 8)
            client.send("record", on=False)
        files = []
        while len(files) < 2:
            client.receive()
            files = [message for message in client.messages if message["type"] == "recording" and message["url"]]
    assert max(behind) <= 3 and 2 in behind
    assert [file["frames"] for file in files] == [sum(lengths) for lengths in written.values()]
    assert all(file["frames"] >= 6 * 12 for file in files)


def test_a_full_disk_ends_the_recording_alone(live):
    with Client(live) as client:
        client.start()
        client.until("pictures")
        with full_disk(2000):
            client.send("record", on=True)
            assert client.until("recording")["url"] is None
            client.until("pictures", block=client.blocks[-1]["block"] + 20)
            client.send("record", on=False)
            error = client.until("error")["message"]
        assert error == "the recording has failed: the server's disk is full, or cannot be written to"
        assert client.until("recording")["url"] is None
        client.until("pictures", block=client.blocks[-1]["block"] + 3)
        client.send("record", on=True)  # there is room again
        client.until("recording")
        client.until("pictures", block=client.blocks[-1]["block"] + 3)
        client.send("record", on=False)
        assert client.until("recording")["frames"] >= 12


def test_the_oldest_recording_goes_first_and_none_is_endless(model):
    with serving(model, max_recordings=2, max_recording_seconds=1.0) as live, Client(live) as client:
        client.start()
        urls = []
        for _ in range(3):
            client.send("record", on=True)
            client.until("recording")
            done = client.until("recording")  # by itself, after 16 frames
            assert done["frames"] == 16
            urls.append(done["url"])
        statuses = [requests.get(f"http://{live.host}{url}").status_code for url in urls]
        assert statuses == [404, 200, 200] and len(os.listdir(live._folder.name)) == 2


def test_a_server_that_ends_lets_go(model):
    before = set(threading.enumerate())
    with serving(model) as live:
        client = Client(live)
        client.start()
        client.until("pictures")
        folder = live._folder.name
    with pytest.raises(websockets.exceptions.ConnectionClosed):
        while True:
            client.receive()
    client.socket.close()
    assert not os.path.exists(folder)
    names = {thread.name for thread in set(threading.enumerate()) - before if thread.is_alive()}
    assert not {name for name in names if name.startswith("live")}
