import functools
import json
import math
import shutil
import subprocess
import tempfile
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch

from astrolabe_diffusers.evaluation.config import ScoreConfig
from astrolabe_diffusers.evaluation.score_files import read_video, score_videos
from astrolabe_diffusers.files.video import VideoWriter
from astrolabe_diffusers.rewards import get_reward
from astrolabe_diffusers.rollout import reward_thread
from astrolabe_diffusers.training import UserError


def words(videos, prompts, metadata):
    """The number of words of the prompt, and the rate that the file has."""
    return [len(prompt.split()) for prompt in prompts], {"fps": [entry["fps"] for entry in metadata]}


def dark_fails(videos, prompts, metadata):
    scores = videos.mean((1, 2, 3, 4))
    if scores.item() < 0.3:
        raise ArithmeticError("too dark")
    return scores, {}


def nothing_to_say(videos, prompts, metadata):
    return [0.5] * len(videos), {"part": [math.nan] * len(videos)}


def rate(videos, prompts, metadata, fps=None):
    return [fps] * len(videos), {}


WORDS = "tests.evaluation.test_score_files:words"


def write(path, gray=128, frames=5, fps=12):
    """A picture of vertical stripes around a gray value, which move."""
    path.write_bytes(encoded(gray, frames, fps))
    return path


@functools.cache
def encoded(gray, frames, fps):
    x = np.arange(48)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.mp4")
        with VideoWriter(path, 32, 48, fps) as writer:
            for t in range(frames):
                row = gray + 40 * np.sin((x - 2 * t) / 4)
                writer.write(np.broadcast_to(row[None, None, :, None], (1, 32, 48, 3)).round().astype(np.uint8))
        return path.read_bytes()


def test_frames_come_as_they_were_written(tmp_path):
    frames, fps = read_video(write(tmp_path / "a.mp4", fps=12))
    assert frames.shape == (5, 3, 32, 48) and frames.dtype == torch.uint8 and fps == 12
    stripes = 128 + 40 * np.sin((np.arange(48) - 2 * np.arange(5)[:, None]) / 4)
    assert np.abs(frames[:, 1, 16].numpy() - stripes).mean() < 4


def test_one_video(tmp_path, capsys):
    path = write(tmp_path / "a.mp4")
    config = ScoreConfig(prompt="a striped wall", rewards=f"sharpness=2,{WORDS}=0.5")
    results = score_videos(str(path), config)
    (video,) = results["videos"]
    sharpness = get_reward("sharpness").score(read_video(path)[0][None] / 255, [""]).scores.item()
    assert video["scores"] == pytest.approx({"sharpness": sharpness, WORDS: 3.0, "reward": 2 * sharpness + 1.5})
    assert (video["file"], video["num_frames"], video["fps"]) == ("a.mp4", 5, 12)
    assert video["info"] == {f"{WORDS}/fps": 12.0}
    assert json.loads((tmp_path / "a.scores.json").read_text()) == results
    printed = capsys.readouterr().out
    assert f"{sharpness:.4f}" in printed and "3.0000" in printed and str(tmp_path / "a.scores.json") in printed


def test_a_part_that_is_no_number_is_null(tmp_path):
    name = f"{__name__}:nothing_to_say"
    score_videos(str(write(tmp_path / "a.mp4")), ScoreConfig(rewards=name, prompt="a"))
    (video,) = json.loads((tmp_path / "a.scores.json").read_text(), parse_constant=pytest.fail)["videos"]
    assert video["info"] == {f"{name}/part": None} and video["scores"] == {name: 0.5}


def test_a_folder_of_generate_has_its_prompts(tmp_path):
    entries = [
        {"file": f"{i}.mp4", "prompt": prompt} for i, prompt in enumerate(["one", "two words", "three words now"])
    ]
    for entry in entries[:2]:
        write(tmp_path / entry["file"])
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    results = score_videos(str(tmp_path), ScoreConfig(rewards=WORDS))
    assert {v["file"]: (v["prompt"], v["scores"][WORDS]) for v in results["videos"]} == {
        "0.mp4": ("one", 1.0),
        "1.mp4": ("two words", 2.0),
    }
    assert results["mean"] == {WORDS: 1.5} and (tmp_path / "scores.json").is_file()
    other = score_videos(str(tmp_path), ScoreConfig(rewards=WORDS, prompt="quite another prompt instead"))
    assert other["mean"] == {WORDS: 4.0}


def test_any_folder(tmp_path):
    for name, gray in (("b", 60), ("a", 190)):
        write(tmp_path / f"{name}.mp4", gray)
    output = tmp_path / "elsewhere.json"
    results = score_videos(str(tmp_path), ScoreConfig(rewards="motion_smoothness,flicker", output=str(output)))
    assert [video["file"] for video in results["videos"]] == ["a.mp4", "b.mp4"]
    assert json.loads(output.read_text())["mean"] == pytest.approx(results["mean"])


def test_rewards_know_the_frame_rate_of_each_file(tmp_path):
    for name, fps in (("a", 8), ("b", 12), ("c", 12)):
        write(tmp_path / f"{name}.mp4", fps=fps)
    reward = "tests.evaluation.test_score_files:rate"
    results = score_videos(str(tmp_path), ScoreConfig(rewards=reward, prompt="stripes"))
    assert [video["scores"][reward] for video in results["videos"]] == [8, 12, 12]


def test_mistakes_are_one_line(tmp_path):
    def fails(path, **settings):
        with pytest.raises(UserError) as error:
            score_videos(str(path), ScoreConfig(**settings))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "there is no video or folder" in fails(tmp_path / "none.mp4")
    assert "no videos (.mp4, " in fails(tmp_path)
    path = write(tmp_path / "a.mp4")
    assert f"{WORDS} compares a video with its prompt: give --prompt" in fails(path, rewards=WORDS)
    assert "unknown reward 'sharpnes'" in fails(path, rewards="sharpnes")
    assert "'flicker' is none of the rewards sharpness" in fails(
        path, rewards="sharpness", reward_options={"flicker": {"x": 1}}
    )
    assert "has no option 'size'; it has fps" in fails(
        path, rewards="dynamic_degree", reward_options="dynamic_degree.size=3"
    )
    assert "no place 'gpu7'" in fails(path, rewards="sharpness", reward_placement="sharpness=gpu7")
    assert "is no tiny_shapes caption" in fails(path, rewards="tiny_shapes_prompt_match", prompt="a cat")
    (tmp_path / "b.mp4").write_text("no video")
    assert "b.mp4 cannot be read as a whole video" in fails(tmp_path / "b.mp4")
    assert "output" in fails(path, output=str(tmp_path / "no" / "folder.json"))
    assert not list(tmp_path.glob("*.json"))


def convert(source, path, *options):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", source, *options, path]
    subprocess.run(command, check=True)
    return path


def packet_sizes(path):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", path, "-c", "copy", "-f", "framecrc", "-"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [int(line.split(",")[4]) for line in lines if not line.startswith("#")]


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "webm"])
def test_a_file_whose_end_is_missing(tmp_path, suffix):
    """As after a download that stopped. Its index, at the front, still says how long it was."""
    source = write(tmp_path / "source.mp4", frames=40)
    codec = ["-c:v", "libvpx"] if suffix == "webm" else ["-c", "copy"]
    whole = convert(source, tmp_path / f"whole.{suffix}", *codec, *["-movflags", "+faststart"] * (suffix[0] == "m"))
    assert len(read_video(whole)[0]) == 40
    data, sizes = whole.read_bytes(), packet_sizes(whole)
    # In a frame, between two, and by a byte.
    for missing in (len(data) // 3, sizes[-1], sum(sizes[-10:]), 1):
        path = tmp_path / f"part.{suffix}"
        path.write_bytes(data[:-missing])
        with pytest.raises(UserError, match="part.* cannot be read as a whole video: ") as error:
            read_video(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["ffconcat version 1.0\nfile secret.mp4\n", "#EXTM3U\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n"]
)
def test_texts_that_name_other_files_are_no_videos(tmp_path, text):
    write(tmp_path / "secret.mp4")
    for name in ("list.mp4", "list.m3u8"):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match="cannot be read as a whole video"):
            read_video(tmp_path / name)


@pytest.mark.parametrize("name", ["10:30.mp4", "-y.mp4", "a%03d b.mp4", "concat:a|b.mp4"])
def test_names_that_mean_something_to_ffmpeg(tmp_path, monkeypatch, name):
    write(tmp_path / "a.mp4").rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    results = score_videos(name, ScoreConfig(rewards="sharpness", output="out.json"))
    assert results["videos"][0]["num_frames"] == 5


def test_a_broken_video_costs_that_video(tmp_path, capsys):
    for name, gray in (("b", 128), ("c", 50), ("d", 200)):
        write(tmp_path / f"{name}.mp4", gray)
    (tmp_path / "a.mp4").write_text("no video")
    reward = "tests.evaluation.test_score_files:dark_fails"
    with pytest.raises(UserError) as error:
        score_videos(str(tmp_path), ScoreConfig(rewards=reward, prompt=""))
    message = str(error.value)
    assert "2 of 4 videos have no scores" in message and "\n" not in message
    assert "scores.json; the first: " in message and "a.mp4 cannot be read" in message
    results = json.loads((tmp_path / "scores.json").read_text())
    assert [video["file"] for video in results["videos"]] == ["a.mp4", "b.mp4", "c.mp4", "d.mp4"]
    a, b, c, d = results["videos"]
    assert "cannot be read" in a["error"]
    assert "c.mp4: a reward failed: ArithmeticError: too dark" in c["error"] and "scores" not in (a | c)
    assert str(tmp_path) in message and str(tmp_path) not in json.dumps(results)
    assert "/tests/" not in json.dumps(results)  # where the reward failed
    assert b["scores"][reward] == pytest.approx(128 / 255, abs=0.02)
    assert results["mean"][reward] == pytest.approx((b["scores"][reward] + d["scores"][reward]) / 2)
    assert "b.mp4" in capsys.readouterr().out


def test_a_folder_of_all_that_users_have(tmp_path):
    source = write(tmp_path / "source.mp4")
    names = ["A.MP4", "b.mov", "c.mkv", "d.avi", "e.webm"]
    for name in names:
        shutil.copy(source, tmp_path / name) if name == "A.MP4" else convert(source, tmp_path / name)
    source.unlink()
    (tmp_path / "._A.MP4").write_bytes(b"\0\5\x16\7")  # as the Finder leaves it
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    results = score_videos(str(tmp_path), ScoreConfig(rewards="sharpness"))
    assert [video["file"] for video in results["videos"]] == names


def test_nothing_else_is_written_over(tmp_path):
    path = write(tmp_path / "a.mp4")
    before = path.read_bytes()
    (tmp_path / "mine.json").write_text('{"videos": 3}')
    for output in ("a.mp4", "mine.json", "."):
        with pytest.raises(UserError, match="output .*") as error:
            score_videos(str(path), ScoreConfig(rewards="sharpness", output=str(tmp_path / output)))
        assert "\n" not in str(error.value)
    assert path.read_bytes() == before and (tmp_path / "mine.json").read_text() == '{"videos": 3}'
    score_videos(str(path), ScoreConfig(rewards="sharpness", output=str(tmp_path / "mine.json"), overwrite=True))
    # Now it is a result, which the same command replaces.
    results = score_videos(str(path), ScoreConfig(rewards="flicker", output=str(tmp_path / "mine.json")))
    assert json.loads((tmp_path / "mine.json").read_text()) == results


def test_a_manifest_that_names_files_elsewhere(tmp_path):
    write(tmp_path / "secret.mp4")
    folder = tmp_path / "videos"
    folder.mkdir()
    write(folder / "a.mp4")
    for entry in ({"file": "../secret.mp4", "prompt": "a"}, {"file": 7, "prompt": "a"}, ["a"]):
        (folder / "manifest.jsonl").write_text(json.dumps(entry) + "\n")
        with pytest.raises(UserError, match=r"line 1, is no entry of a video in this folder \(file, prompt\)"):
            score_videos(str(folder), ScoreConfig(rewards="sharpness"))
        # With a prompt of one's own it is not asked.
        results = score_videos(str(folder), ScoreConfig(rewards="sharpness", prompt="mine"))
        assert [video["file"] for video in results["videos"]] == ["a.mp4"]


def test_a_reward_that_hangs_ends_the_run_and_keeps_what_there_is(tmp_path, monkeypatch):
    monkeypatch.setattr(reward_thread, "PATIENCE", 0.1)
    for name in ("a", "b", "c"):
        write(tmp_path / f"{name}.mp4")
    hangs = "tests.training.rewards:hangs_at_dark"
    write(tmp_path / "b.mp4", gray=40)
    with pytest.raises(UserError, match="a reward has not answered for 0.5 s") as error:
        score_videos(str(tmp_path), ScoreConfig(rewards=hangs, prompt="", reward_timeout=0.5))
    assert "2 of 3 videos have no scores" in str(error.value)
    results = json.loads((tmp_path / "scores.json").read_text())
    assert [(video["file"], "scores" in video) for video in results["videos"]] == [("a.mp4", True), ("b.mp4", False)]
