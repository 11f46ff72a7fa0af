"""One connection, over a real one: what is said and sent, what is wrong, and who does not read."""

import itertools
import json
import random
import socket
import threading
import time
from contextlib import ExitStack, suppress

import pytest
import websockets.exceptions
from PIL import Image

from astrolabe_diffusers.live import viewer as viewer_module
from astrolabe_diffusers.live.app import LiveApp
from astrolabe_diffusers.live.encoding import ImageEncoder
from astrolabe_diffusers.live.engine import LiveEngine
from astrolabe_diffusers.live.server import make_live_server
from astrolabe_diffusers.live.session import Block, LiveSession, replay
from astrolabe_diffusers.live.start_file import StartFile
from astrolabe_diffusers.serving.binding import bind
from astrolabe_diffusers.serving.bounded_websocket import BoundedWebSocket
from astrolabe_diffusers.serving.running import in_thread
from tests.live.clients import Client, closed_with, connect_silent, idle, masked, serving
from tests.live.helpers import make_model
from tests.live.pictures import decode
from tests.pipelines.test_scenes import A, B
from tests.waiting import wait_for


# What it says


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


# A start that takes long


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
            patch.setattr(viewer_module, "make_encoder", fail)
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
    kinds = [*viewer_module.ANSWERS, "hello", None]
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


# Slow, and idle


def test_a_page_that_is_left_open_makes_room(model, monkeypatch):
    """One without a video, and one whose video has ended, but not one that is paused."""
    monkeypatch.setattr(viewer_module, "IDLE_SECONDS", 1.5)
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


def test_who_does_not_read_loses_frames_and_costs_no_memory(model, monkeypatch):
    """A client that says it has shown everything and reads nothing, in a server whose frames are large."""
    monkeypatch.setattr(BoundedWebSocket, "seconds", 2.0)
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
    monkeypatch.setattr(viewer_module, "MESSAGES_PER_SECOND", 10_000)
    monkeypatch.setattr(BoundedWebSocket, "seconds", 1.0)
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
