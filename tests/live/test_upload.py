"""Files that viewers send: what a video starts from, and sessions that are replayed."""

import gc
import json
import socket
import threading
from contextlib import ExitStack

import pytest

from astrolabe_diffusers.live import upload as upload_module
from astrolabe_diffusers.live.session import replay
from astrolabe_diffusers.live.start_file import StartFile
from tests.live.clients import Client, idle, serving
from tests.live.files import picture_file, video_file
from tests.live.helpers import make_model
from tests.live.pictures import decode
from tests.pipelines.test_scenes import B
from tests.waiting import wait_for


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
    monkeypatch.setattr(upload_module, "_MAX_CHECKS", 1)
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
