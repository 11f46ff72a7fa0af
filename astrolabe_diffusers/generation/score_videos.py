"""Scores of videos that exist as files, without any model that generates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import torch

from ..rewards import RewardError, RewardPlaceError, RewardSet
from ..training.config import RewardConfig, option
from ..training.errors import UserError, as_user_error, one_line
from ..training.report import markdown_table
from ..training.shareable import shareable
from .manifest import Manifest


@dataclass
class ScoreConfig(RewardConfig):
    """How videos are scored. Checked when the object is made."""

    prompt: str | None = option(None, "what the videos were made from; the manifest of generate.py's folders has it")
    reward: dict[str, float] = option({"motion_smoothness": 1.0}, "rewards: name,name or name=weight,name=weight")
    output: str | None = option(None, "the JSON file; if not given, scores.json in the folder, or NAME.scores.json")


def score_videos(path: str, config: ScoreConfig) -> dict[str, Any]:
    """
    Score a video, or the videos of a folder, one after the other; print a table and write JSON.

    Args:
        path: a video file, or a folder of MP4 files. With `manifest.jsonl` of generate.py, and no `config.prompt`,
            those in it are scored, each for its own prompt.

    Returns:
        What it wrote: `settings`, `videos` (`file`, `prompt`, `fps`, `num_frames`, `scores` by reward, `info` by
        reward and part) and `mean` of the scores. With several rewards `reward` is their weighted sum.

    Raises:
        UserError: a mistake in the settings, a file that is no video, or a reward that cannot score it.
    """
    source = Path(path)
    videos = find_videos(source, config.prompt)
    results = {"settings": shareable(config), "videos": []}
    rewards = last_fps = None
    try:
        for file, prompt in videos:
            frames, fps = read_video(file)
            if fps != last_fps:
                if rewards is not None:
                    rewards.close()
                rewards, last_fps = make_rewards(config, fps), fps
            if prompt is None and rewards.using_prompts:
                raise UserError(f"{rewards.using_prompts[0]} compares a video with its prompt: give --prompt.")
            scores = score_video(file.name, frames, fps, prompt or "", rewards)
            results["videos"].append({"file": file.name, "prompt": prompt or "", **scores})
            print(f"{len(results['videos'])}/{len(videos)} {file.name}", end="\r", flush=True)
    finally:
        if rewards is not None:
            rewards.close()
    names = list(results["videos"][0]["scores"])
    results["mean"] = {n: sum(v["scores"][n] for v in results["videos"]) / len(videos) for n in names}
    output = Path(config.output or (source / "scores.json" if source.is_dir() else source.with_suffix(".scores.json")))
    with as_user_error("output"):
        output.write_text(json.dumps(results, indent=2) + "\n")
    rows = [[v["file"], *(f"{v['scores'][name]:.4f}" for name in names)] for v in results["videos"]]
    if len(rows) > 1:
        rows.append(["mean", *(f"{results['mean'][name]:.4f}" for name in names)])
    print(markdown_table([["", *names], *rows]), output, sep="\n")
    return results


def find_videos(source: Path, prompt: str | None) -> list[tuple[Path, str | None]]:
    """The files to score, each with its prompt."""
    if source.is_file():
        return [(source, prompt)]
    if not source.is_dir():
        raise UserError(f"there is no video or folder {source}.")
    entries = Manifest(source).read()
    if entries and prompt is None:
        return [(source / file, entry["prompt"]) for file, entry in entries.items()]
    files = sorted(source.glob("*.mp4"))
    if not files:
        raise UserError(f"there are no .mp4 files in {source}.")
    return [(file, prompt) for file in files]


def make_rewards(config: ScoreConfig, fps: float) -> RewardSet:
    with as_user_error("reward"):
        return RewardSet(config.reward, config.reward_options, config.reward_placement, config.reward_timeout, fps)


def score_video(name: str, frames: torch.Tensor, fps: float, prompt: str, rewards: RewardSet) -> dict[str, Any]:
    """What JSON holds of a video, uint8 `(F, 3, H, W)`, beside its name and prompt."""
    device = "cuda" if torch.cuda.is_available() else "cpu"  # resizing is slow on a CPU
    try:
        output = rewards(frames[None].to(device).float() / 255, [prompt], [{"fps": fps}])
    except (RewardError, RewardPlaceError, ValueError) as error:
        raise UserError(f"{name}: {one_line(error)}") from error
    scores = {name: values.item() for name, values in output.scores.items()}
    if len(scores) > 1:
        scores["reward"] = output.total.item()
    return {
        "fps": fps,
        "num_frames": len(frames),
        "scores": scores,
        "info": {name: values.item() for name, values in output.info.items()},
    }


def read_video(path: Path) -> tuple[torch.Tensor, float]:
    """All frames of a video as uint8 `(F, 3, H, W)`, and how many there are a second.

    Raises:
        UserError: the file is no video.
    """
    try:
        pieces: Iterator = imageio_ffmpeg.read_frames(str(path))
        meta = next(pieces)
        width, height = meta["size"]
        frames = [np.frombuffer(piece, np.uint8).reshape(height, width, 3) for piece in pieces]
    except (OSError, RuntimeError, StopIteration) as error:
        raise UserError(f"{path} cannot be read as a video: {one_line(error)[-200:]}") from error
    if not frames:
        raise UserError(f"{path} has no frames.")
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2), meta["fps"]
