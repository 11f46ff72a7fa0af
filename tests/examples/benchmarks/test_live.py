"""examples/benchmarks/live.py: viewers of a server, and the encoders."""

import asyncio
import time

import pytest

from astrolabe_diffusers import TinyWanDecoder
from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.live.app import LiveApp
from astrolabe_diffusers.live.engine import LiveEngine
from astrolabe_diffusers.live.server import make_live_server
from astrolabe_diffusers.serving.binding import bind
from astrolabe_diffusers.serving.running import in_thread
from tests.live.helpers import make_model
from tests.tiny_pipeline import tiny_pipeline


def test_what_a_viewer_sees(capsys):
    from live import main

    (seen,) = main(["--model", "tiny_shapes", "--seconds", "6", "--codec", "jpeg"])
    assert 0 < seen.first_frame < 10 and 6 * 16 * 0.5 < seen.frames <= 6 * 16 + 1
    assert seen.delays and 0 < seen.delay_median <= seen.delay_p95 < 10
    assert 0.1 < seen.memory_first <= seen.memory_last * 1.2 and seen.megabits_per_second > 0.01
    assert "underruns" in capsys.readouterr().out


def test_longer_than_the_model_has_positions_is_told_in_a_line(monkeypatch):
    from live import main

    pipe = tiny_pipeline(rope_mode="absolute", frame_rate=16)
    monkeypatch.setattr("random_models.random_pipeline", lambda *_: pipe)
    with pytest.raises(UserError, match="--seconds 200, and 60 more: `num_frames=41.* 64 absolute positions"):
        main(["--recipe", "longlive", "--seconds", "200"])


def test_a_published_model_with_a_tiny_decoder(monkeypatch, capsys):
    from live import main

    pipe = tiny_pipeline(rope_mode="relative", local_attn_size=6, frame_rate=16)
    monkeypatch.setattr("random_models.random_pipeline", lambda *_: pipe)
    (seen,) = main(["--recipe", "longlive", "--tiny_decoder", "random", "--seconds", "1", "--codec", "jpeg"])
    assert seen.frames and isinstance(pipe.tiny_decoder, TinyWanDecoder)


def test_what_encoding_costs():
    from live import main

    figures = main(["--encoding", "--height", "96", "--width", "160"])
    assert list(figures) == ["h264", "jpeg", "webp"]
    assert all(milliseconds > 0 and 0.1 < kilobytes < 46 and decibels > 25 for milliseconds, kilobytes, decibels in
               figures.values())  # fmt: skip


def test_a_viewer_that_was_late_itself_hurries_through_nothing():
    """Or its buffer would run dry, which no page's would."""
    from live import Viewer

    class Socket:
        shown = []

        async def send(self, text):
            self.shown.append(time.perf_counter())
            if len(self.shown) == 3:
                time.sleep(0.6)  # the process is

    async def play():
        viewer = Viewer(Socket(), 0, "jpeg")
        viewer.rate = 16
        viewer.buffer.extend(range(100))
        viewer.arrived.set()
        await viewer.play(1.3)

    asyncio.run(play())
    _, *late = Socket.shown[2:11]
    assert late[-1] - late[0] >= 6 / 16


def test_a_frame_that_comes_late():
    from live import Viewer

    class Socket:
        async def send(self, text):
            pass

    async def play():
        viewer = Viewer(Socket(), 0, "jpeg")
        viewer.rate = 16
        viewer.buffer.extend(range(3))
        viewer.arrived.set()
        playing = asyncio.create_task(viewer.play(0.8))
        await asyncio.sleep(0.5)
        came = time.perf_counter()
        viewer.buffer.extend(range(3, 50))
        viewer.arrived.set()
        await playing
        return viewer.late, came - viewer.began

    ((frame, waited), *_), came = asyncio.run(play())
    assert frame == 3 and 0 < waited < came


def test_a_viewer_that_is_refused_says_why():
    from live import visit

    async def visits(url):
        first = asyncio.create_task(visit(url, 0, 30, "jpeg"))
        while not live.engine.running:
            await asyncio.sleep(0.05)
        with pytest.raises(UserError, match="0 viewers are waiting already"):
            await asyncio.wait_for(visit(url, 1, 30, "jpeg"), 20)
        first.cancel()

    with LiveApp(make_model(), LiveEngine(waiting=0)) as live, bind("127.0.0.1", 0) as listener:
        with in_thread(make_live_server(live), listener) as address:
            asyncio.run(visits(f"ws://{address}/ws"))
