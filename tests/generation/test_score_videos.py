import json

import numpy as np
import pytest
import torch

from astrolabe_diffusers.generation import ScoreConfig, score_videos
from astrolabe_diffusers.generation.score_videos import read_video
from astrolabe_diffusers.generation.video_file import VideoWriter
from astrolabe_diffusers.rewards import get_reward
from astrolabe_diffusers.training import UserError


def words(videos, prompts, metadata):
    """The number of words of the prompt, and the rate that the file has."""
    return [len(prompt.split()) for prompt in prompts], {"fps": [entry["fps"] for entry in metadata]}


def rate(videos, prompts, metadata, fps=None):
    return [fps] * len(videos), {}


WORDS = "tests.generation.test_score_videos:words"


def write(path, gray=128, frames=5, fps=12):
    """A picture of vertical stripes around a gray value, which move."""
    x = np.arange(48)
    with VideoWriter(path, 32, 48, fps) as writer:
        for t in range(frames):
            row = gray + 40 * np.sin((x - 2 * t) / 4)
            writer.write(np.broadcast_to(row[None, None, :, None], (1, 32, 48, 3)).round().astype(np.uint8))
    return path


def test_frames_come_as_they_were_written(tmp_path):
    frames, fps = read_video(write(tmp_path / "a.mp4", fps=12))
    assert frames.shape == (5, 3, 32, 48) and frames.dtype == torch.uint8 and fps == 12
    stripes = 128 + 40 * np.sin((np.arange(48) - 2 * np.arange(5)[:, None]) / 4)
    assert np.abs(frames[:, 1, 16].numpy() - stripes).mean() < 4


def test_one_video(tmp_path, capsys):
    path = write(tmp_path / "a.mp4")
    config = ScoreConfig(prompt="a striped wall", reward=f"sharpness=2,{WORDS}=0.5")
    results = score_videos(str(path), config)
    (video,) = results["videos"]
    sharpness = get_reward("sharpness").score(read_video(path)[0][None] / 255, [""]).scores.item()
    assert video["scores"] == pytest.approx({"sharpness": sharpness, WORDS: 3.0, "reward": 2 * sharpness + 1.5})
    assert (video["file"], video["num_frames"], video["fps"]) == ("a.mp4", 5, 12)
    assert video["info"] == {f"{WORDS}/fps": 12.0}
    assert json.loads((tmp_path / "a.scores.json").read_text()) == results
    printed = capsys.readouterr().out
    assert f"{sharpness:.4f}" in printed and "3.0000" in printed and str(tmp_path / "a.scores.json") in printed


def test_a_folder_of_generate_has_its_prompts(tmp_path):
    entries = [
        {"file": f"{i}.mp4", "prompt": prompt} for i, prompt in enumerate(["one", "two words", "three words now"])
    ]
    for entry in entries[:2]:
        write(tmp_path / entry["file"])
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    results = score_videos(str(tmp_path), ScoreConfig(reward=WORDS))
    assert {v["file"]: (v["prompt"], v["scores"][WORDS]) for v in results["videos"]} == {
        "0.mp4": ("one", 1.0),
        "1.mp4": ("two words", 2.0),
    }
    assert results["mean"] == {WORDS: 1.5} and (tmp_path / "scores.json").is_file()
    other = score_videos(str(tmp_path), ScoreConfig(reward=WORDS, prompt="quite another prompt instead"))
    assert other["mean"] == {WORDS: 4.0}


def test_any_folder(tmp_path):
    for name, gray in (("b", 60), ("a", 190)):
        write(tmp_path / f"{name}.mp4", gray)
    output = tmp_path / "elsewhere.json"
    results = score_videos(str(tmp_path), ScoreConfig(reward="motion_smoothness,flicker", output=str(output)))
    assert [video["file"] for video in results["videos"]] == ["a.mp4", "b.mp4"]
    assert json.loads(output.read_text())["mean"] == pytest.approx(results["mean"])


def test_rewards_know_the_frame_rate_of_each_file(tmp_path):
    for name, fps in (("a", 8), ("b", 12), ("c", 12)):
        write(tmp_path / f"{name}.mp4", fps=fps)
    reward = "tests.generation.test_score_videos:rate"
    results = score_videos(str(tmp_path), ScoreConfig(reward=reward, prompt="stripes"))
    assert [video["scores"][reward] for video in results["videos"]] == [8, 12, 12]


def test_mistakes_are_one_line(tmp_path):
    def fails(path, **settings):
        with pytest.raises(UserError) as error:
            score_videos(str(path), ScoreConfig(**settings))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "there is no video or folder" in fails(tmp_path / "none.mp4")
    assert "no .mp4 files" in fails(tmp_path)
    path = write(tmp_path / "a.mp4")
    assert f"{WORDS} compares a video with its prompt: give --prompt" in fails(path, reward=WORDS)
    assert "unknown reward 'sharpnes'" in fails(path, reward="sharpnes")
    assert "'flicker' is none of the rewards sharpness" in fails(
        path, reward="sharpness", reward_options={"flicker": {"x": 1}}
    )
    assert "has no option 'size'; it has fps" in fails(
        path, reward="dynamic_degree", reward_options="dynamic_degree.size=3"
    )
    assert "no place 'gpu7'" in fails(path, reward="sharpness", reward_placement="sharpness=gpu7")
    assert "is no tiny_shapes caption" in fails(path, reward="tiny_shapes_prompt_match", prompt="a cat")
    (tmp_path / "b.mp4").write_text("no video")
    assert "b.mp4 cannot be read as a video" in fails(tmp_path / "b.mp4")
    assert "output" in fails(path, output=str(tmp_path / "no" / "folder.json"))
