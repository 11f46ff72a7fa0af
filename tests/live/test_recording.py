"""Recordings: every frame once and in order, to its end, a full disk or none."""

import os
import time

import imageio.v3
import numpy as np
import pytest
import requests

from astrolabe_diffusers.live import recording as recording_module
from astrolabe_diffusers.live.recording import Recorder
from astrolabe_diffusers.live.session import replay
from tests.live.clients import Client
from tests.live.pictures import moving_square
from tests.pipelines.test_scenes import B
from tests.training.helpers import full_disk


def test_a_recording_has_every_frame_once_and_in_order(tmp_path):
    frames = moving_square(30)
    recorder = Recorder(tmp_path / "a.mp4", 48, 64, 16, max_frames=1000)
    for start, end in ((0, 9), (9, 21), (21, 30)):
        recorder.write(frames[start:end])
    assert not (tmp_path / "a.mp4").exists()
    recorder.finish()
    video = imageio.v3.imread(tmp_path / "a.mp4")
    assert video.shape == frames.shape and imageio.v3.immeta(tmp_path / "a.mp4")["fps"] == 16
    # Where the square begins, counted from the left.
    dark = (video[:, 20].astype(int).sum(axis=-1) < 500).argmax(axis=1)
    assert abs(dark - (4 + np.arange(30))).max() <= 1


def test_a_recording_has_an_end(tmp_path):
    recorder = Recorder(tmp_path / "a.mp4", 48, 64, 16, max_frames=15)
    recorder.write(moving_square(12))
    assert not recorder.is_full
    recorder.write(moving_square(12))
    assert recorder.is_full
    recorder.finish()
    assert len(imageio.v3.imread(tmp_path / "a.mp4")) == 15


def test_of_a_recording_that_is_discarded_nothing_is_left(tmp_path):
    recorder = Recorder(tmp_path / "a.mp4", 48, 64, 16, max_frames=100)
    recorder.write(moving_square(12))
    recorder.discard()
    assert not os.listdir(tmp_path)
    Recorder(tmp_path / "b.mp4", 48, 64, 16, max_frames=100).discard()
    assert not os.listdir(tmp_path)


def test_a_full_disk_is_an_error(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (12, 48, 64, 3), dtype=np.uint8)
    recorder = Recorder(tmp_path / "a.mp4", 48, 64, 16, max_frames=10_000)
    with full_disk(4096), pytest.raises(OSError, match="is the disk full"):
        for _ in range(200):
            recorder.write(noise)
        recorder.finish()
    recorder.discard()
    assert not os.listdir(tmp_path)


# Of a session


def test_a_recording_is_every_frame_and_the_replay_its_equal(live, model):
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

    add = recording_module.Recording.add

    def watch(self, block):
        add(self, block)
        behind.append(len(self._blocks))

    monkeypatch.setattr(Recorder, "write", slow)
    monkeypatch.setattr(recording_module.Recording, "add", watch)
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
