"""From settings to a server, and from a saved session to its video."""

import json
import signal
from pathlib import Path

import imageio.v3
import numpy as np
import pytest
import requests
import torch
from websockets.sync.client import connect

from astrolabe_diffusers import TINY_SHAPES
from astrolabe_diffusers.cli.main import main
from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.files.video import VideoWriter
from astrolabe_diffusers.live.config import LiveConfig
from astrolabe_diffusers.live.load import load_live_app, load_model, read_presets, warm_up
from astrolabe_diffusers.live.session import LiveSession
from astrolabe_diffusers.live.start_file import StartFile
from astrolabe_diffusers.rewards import get_reward
from astrolabe_diffusers.serving.binding import bind
from tests.live.files import video_file
from tests.live.helpers import ENDLESS, make_model, save_loras
from tests.pipelines.test_scenes import A, B
from tests.processes import Script
from tests.tiny_pipeline import save_tiny_pipeline
from tests.waiting import wait_for


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's folder, two LoRAs, and sessions that were steered, with their frames."""
    folder = tmp_path_factory.mktemp("live")
    save_tiny_pipeline(folder / "model", **ENDLESS)
    loras = save_loras(folder / "loras")
    model = load_model(LiveConfig(model=str(folder / "model"), lora={str(loras[0]): 1.0}), None, None)
    video = video_file(folder / "start.mp4").read_bytes()
    for name, start in (("mine", None), ("from_a_file", StartFile.read(video))):
        session = LiveSession(model, A, 11, compare=True, start_file=start)
        lanes = [session.make_block()[0] for _ in range(2)]
        session.send({"type": "prompt", "prompt": B, "transition": "recache"})
        session.send({"type": "lora", "weights": {"first": 0.25}})
        lanes += [session.make_block()[0] for _ in range(3)]
        (folder / f"{name}.json").write_text(json.dumps(session.record()))
        for lane, suffix in enumerate(("-base", "")):
            np.save(folder / f"{name}{suffix}.npy", np.concatenate([blocks[lane].frames for blocks in lanes]))
    return folder


def generate(folder, *words, session="mine"):
    return main(["generate", "--model", str(folder / "model"), "--session", str(folder / f"{session}.json"), *words])


@pytest.mark.parametrize("name", ["mine", "from_a_file"])
def test_the_frames_of_a_session_again(folder, tmp_path, monkeypatch, name):
    """Bit for bit, as they come to the encoder."""
    written = {}
    write = VideoWriter.write

    def keep(self, frames):
        written.setdefault(self.path.name, []).append(frames)
        write(self, frames)

    monkeypatch.setattr(VideoWriter, "write", keep)
    words = ("--lora", f"{folder}/loras/first=0.5", "--output_dir", str(tmp_path))
    assert generate(folder, *words, session=name) == 0
    for lane in (f"{name}-base", name):
        frames = np.load(folder / f"{lane}.npy")
        assert np.array_equal(np.concatenate(written[f"{lane}.mp4"]), frames)
        assert imageio.v3.imread(tmp_path / f"{lane}.mp4").shape == frames.shape


FEW_TOKENS = {"max_sequence_length": 4}
TILES = {"vae_tiling": True, "width": 272}


@pytest.mark.parametrize("settings", [FEW_TOKENS, TILES, {"compile": True}])
def test_a_session_says_how_its_model_was_made(folder, tmp_path, monkeypatch, settings):
    """Then `generate` does the same without being told."""
    model = load_model(LiveConfig(model=str(folder / "model"), **settings), None, None)
    session = LiveSession(model, A, 5)
    frames = np.concatenate([session.make_block()[0][0].frames for _ in range(3)])
    path = tmp_path / "made.json"
    path.write_text(json.dumps(session.record()))
    compiled, written = [], []
    monkeypatch.setattr("astrolabe_diffusers.live.load.compile_model", compiled.append)
    monkeypatch.setattr(VideoWriter, "write", lambda self, frames: written.append(frames))
    monkeypatch.setattr(VideoWriter, "__exit__", lambda self, *_: self._encoder.close())
    words = ["generate", "--model", str(folder / "model"), "--session", str(path), "--output_dir", str(tmp_path)]
    assert main(words) == 0
    assert np.array_equal(np.concatenate(written), frames)
    assert len(compiled) == bool(settings.get("compile"))


def test_the_session_of_another_model_is_refused(folder, tmp_path, capsys):
    output = ("--output_dir", str(tmp_path))
    for words, message in (
        ((), "session mine.json: it was made with the LoRA first: load that one, and under this name."),
        (("--dtype", "bfloat16", "--lora", f"{folder}/loras/first"), "it was made with other weights"),
        (("--compile", "--lora", f"{folder}/loras/first"), "it was made with compile False, not True: give that one"),
    ):
        assert generate(folder, *words, *output) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    for text in ('{"version": 1}', "[]", "3"):
        (tmp_path / "no.json").write_text(text)
        assert main(["generate", "--session", str(tmp_path / "no.json"), *output]) == 2
        assert "session no.json: it is no session, which has" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.mp4*"))
    (tmp_path / "mine.mp4").write_text("somebody's")
    assert generate(folder, *output) == 2
    assert "mine.mp4 is there already: name another --output_dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"codecs": ["h265"]}, "codecs may be h264, jpeg, webp, not h265"),
        ({"codecs": []}, "codecs may be h264, jpeg, webp, not empty"),
        ({"compile": True, "lora": {"a": 1.0}}, "compile takes no lora here"),
        ({"sessions": 0}, "sessions must be at least 1"),
        ({"offload": "model", "sessions": 2}, "offload is for one session"),
        ({"max_sequence_length": 9999}, "max_sequence_length"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(UserError, match=message):
        LiveConfig(**settings)


def test_what_only_the_model_knows_is_told_in_a_line(folder, tmp_path):
    config = {"model": str(folder / "model")}
    with pytest.raises(UserError, match="video size: `height` must be a multiple of 16"):
        load_live_app(LiveConfig(**config, height=17))
    with pytest.raises(UserError, match="num_frames: .* at least 9"):
        load_live_app(LiveConfig(**config, num_frames=2))
    save_tiny_pipeline(tmp_path, **ENDLESS | {"rope_mode": "absolute"})
    with pytest.raises(UserError, match="num_frames: `num_frames=261` passes the model's 64 absolute positions"):
        load_live_app(LiveConfig(model=str(tmp_path), num_frames=261))


def test_h264_that_is_not_there_is_said(folder, monkeypatch):
    monkeypatch.setattr("astrolabe_diffusers.live.encoding.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="codecs: h264 needs PyAV"):
        load_live_app(LiveConfig(model=str(folder / "model"), codecs=["h264"]))


def test_an_app_of_settings(folder):
    lora = {f"{folder}/loras/first": 2}
    live = load_live_app(LiveConfig(model=str(folder / "model"), height=32, width=16, lora=lora))
    hello = live.hello()
    assert (hello["height"], hello["width"], hello["max_pixels"]) == (32, 16, 512)
    assert (hello["model"], hello["loras"]) == ("model", {"first": 2.0})
    assert hello["presets"] == (folder / "model/prompts/test.txt").read_text().splitlines()
    with live:
        pass


def test_a_warm_model_knows_how_long_a_block_takes(tmp_path):
    model = make_model(dict.fromkeys(save_loras(tmp_path / "loras"), 1.0))
    assert LiveSession(model, A, 0).block_seconds == 0
    warm_up(model)
    assert model.block_seconds > 0
    assert LiveSession(model, A, 0).block_seconds == model.block_seconds
    assert LiveSession(model, A, 0, compare=True).block_seconds == 2 * model.block_seconds


@pytest.mark.parametrize("num_frames,seconds", [(9, 30.0), (21, 20.0), (33, 10.0), (None, 5.0)])
def test_a_warm_model_counts_the_last_block(monkeypatch, num_frames, seconds):
    """The window has three; or the last one of a shorter video."""
    make = LiveSession.make_block

    def make_slowly(session):
        blocks, marks = make(session)
        blocks[0].seconds = (30.0, 20.0, 10.0, 9.0, 8.0, 5.0)[blocks[0].number]
        return blocks, marks

    monkeypatch.setattr(LiveSession, "make_block", make_slowly)
    model = make_model(num_frames=num_frames)
    warm_up(model)
    assert model.block_seconds == seconds


def test_a_warm_model_has_filled_its_window_and_taken_a_prompt(monkeypatch):
    made, make = [], LiveSession.make_block

    def count(session):
        blocks, marks = make(session)
        made.append([mark.event["type"] for mark in marks])
        return blocks, marks

    monkeypatch.setattr(LiveSession, "make_block", count)
    warm_up(make_model(config={"local_attn_size": 12, "sink_size": 3, "rope_mode": "relative"}))
    assert made == [[], [], [], [], ["prompt"], [], []]


def test_presets_of_the_embedded_model_work():
    """Every one of them, from a seed of nobody's choice."""
    presets = read_presets(TINY_SHAPES)
    assert len(presets) >= 6 and presets == [
        line for line in (Path(TINY_SHAPES) / "prompts/presets.txt").read_text().splitlines() if line
    ]
    model = load_model(LiveConfig(model="tiny_shapes"), None, None)
    reward = get_reward("tiny_shapes_prompt_match")
    reward = reward() if isinstance(reward, type) else reward
    for preset in presets:
        session = LiveSession(model, preset, 123)
        frames = [torch.from_numpy(session.make_block()[0][0].frames) for _ in range(2)]
        video = torch.cat(frames).permute(0, 3, 1, 2)[None] / 255
        assert reward.score(video, [preset], [{}]).scores.item() > 0.85, preset


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command(folder, tmp_path, number):
    """It says where it is, serves, needs its token, ends at a signal, and leaves nothing."""
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    words = ["--model", folder / "model", "--port", port]
    process = Script("examples/live.py", *words, ASTROLABE_LIVE_TOKEN="secret", TMPDIR=str(tmp_path))
    try:
        process.wait_for("\n")
        wait_for(lambda: requests.get(f"http://127.0.0.1:{port}/health").status_code == 200)
        with connect(f"ws://127.0.0.1:{port}/ws?token=secret", max_size=None, proxy=None) as client:
            assert json.loads(client.recv())["type"] == "hello"
            client.send(json.dumps({"type": "start", "prompt": A, "seed": 0}))
            while isinstance(client.recv(20), str):
                pass
            assert list(tmp_path.glob("astrolabe-live-*"))
            process.send_signal(number)
            code, output = process.finish(20)
        assert code == 128 + number
        assert output == f"model at http://127.0.0.1:{port}/?token=secret\n"
        assert not list(tmp_path.glob("astrolabe-live-*"))
    finally:
        process.kill_all()
