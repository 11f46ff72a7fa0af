"""What all connections share: what it says of itself, what it keeps, and what is left of it."""

import gc
import os
import socket
import threading

import psutil
import pytest
import requests
import websockets.exceptions

from tests.live.clients import Client, idle, serving
from tests.pipelines.test_scenes import A, B
from tests.waiting import wait_for


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
