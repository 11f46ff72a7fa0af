"""Scores of videos that exist as files, without any model that generates."""

import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import torch

from ..errors import UserError, as_user_error, one_line, summarize_exception
from ..files.output_folder import is_result
from ..files.text import to_json
from ..files.writing import replacing
from ..generation.manifest import Manifest
from ..reporting.markdown import markdown_table
from ..rewards import RewardError, RewardPlacementError, RewardSet
from ..rollout.reward_thread import RewardThread
from ..shareable import shareable, shareable_value
from .config import ScoreConfig


SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
# Of ffmpeg's formats those that are one video in one file. Others, such as concat and hls, read what a text names.
FORMATS = "mov,matroska,avi,gif,mpegts,mpeg,flv,asf,ogg,ivf"


def score_videos(path: str, config: ScoreConfig) -> dict[str, Any]:
    """
    Score a video, or the videos of a folder, one after the other; print a table and write JSON. With a
    `manifest.jsonl` and no `config.prompt` those in it are scored, each for its own prompt.

    Returns:
        What it wrote: `settings`, `videos` (`file`, `prompt`, `fps`, `num_frames`, `scores` by reward, `info` by
        reward and part; or `file`, `prompt` and `error`) and `mean` of the scores. With several rewards `reward` is
        their weighted sum.

    Raises:
        UserError: a mistake in the settings; a place of rewards that does not answer; or a file that is no whole
            video, or that a reward cannot score. The scores of the other videos are then written all the same.
    """
    source = Path(path)
    videos = find_videos(source, config.prompt)
    output = Path(config.output or (source / "scores.json" if source.is_dir() else source.with_suffix(".scores.json")))
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"output {output} must be a file in a folder that exists.")
    if output.exists() and not is_result(output, "settings", "videos", "mean") and not config.overwrite:
        raise UserError(f"output {output} is there and is no earlier result: name another, or --overwrite true.")
    results, errors = {"settings": shareable(config), "videos": []}, []

    def note(error: UserError):
        errors.append(str(error))
        # The file names no server and no folder.
        results["videos"][-1]["error"] = shareable_value(errors[-1]) or "a server of rewards failed"

    with ExitStack() as resources:
        thread = resources.enter_context(RewardThread(config.reward_timeout))
        rewards = last_fps = None
        for file, prompt in videos:
            entry = {"file": file.name, "prompt": prompt or ""}
            results["videos"].append(entry)
            try:
                frames, fps = read_video(file)
            except UserError as error:
                note(error)
                continue
            if fps != last_fps:
                if rewards is not None:
                    rewards.close()
                rewards, last_fps = resources.enter_context(config.make_rewards(config.rewards, fps)), fps
            if prompt is None and rewards.using_prompts:
                raise UserError(f"{rewards.using_prompts[0]} compares a video with its prompt: give --prompt.")
            try:
                entry |= thread.submit(score_video, file.name, frames, fps, prompt or "", rewards).result()
            except UserError as error:
                note(error)
                if error.__cause__ is None or isinstance(error.__cause__, RewardPlacementError):
                    break  # it hangs or is gone, and would be for every video
            print(f"{len(results['videos'])}/{len(videos)} {file.name}", end="\r", flush=True)
    scored = [video for video in results["videos"] if "scores" in video]
    if not scored:
        raise UserError(errors[0])
    names = list(scored[0]["scores"])
    results["mean"] = {n: sum(v["scores"][n] for v in scored) / len(scored) for n in names}
    with replacing(output) as partial:
        partial.write_text(to_json(results, indent=2) + "\n")
    rows = [[v["file"], *(f"{v['scores'][name]:.4f}" for name in names)] for v in scored]
    if len(rows) > 1:
        rows.append(["mean", *(f"{results['mean'][name]:.4f}" for name in names)])
    print(markdown_table([["", *names], *rows]), output, sep="\n")
    if errors:
        number = len(videos) - len(scored)
        raise UserError(f"{number} of {len(videos)} videos have no scores, see {output}; the first: {errors[0]}")
    return results


def find_videos(source: Path, prompt: str | None) -> list[tuple[Path, str | None]]:
    """The files to score, each with its prompt."""
    if source.is_file():
        return [(source, prompt)]
    if not source.is_dir():
        raise UserError(f"there is no video or folder {source}.")
    if prompt is None and (entries := Manifest(source).read(["file", "prompt"])):
        return [(source / file, entry["prompt"]) for file, entry in entries.items()]
    files = sorted(file for file in source.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    # The Mac's Finder puts a ._NAME.mp4, which is no video, beside every NAME.mp4 on a foreign disk.
    files = [file for file in files if not file.name.startswith(".")]
    if not files:
        raise UserError(f"there are no videos ({', '.join(SUFFIXES)}) in {source}.")
    return [(file, prompt) for file in files]


def score_video(name: str, frames: torch.Tensor, fps: float, prompt: str, rewards: RewardSet) -> dict[str, Any]:
    """What JSON holds of a video, uint8 `(F, 3, H, W)`, beside its name and prompt."""
    device = "cuda" if torch.cuda.is_available() else "cpu"  # resizing is slow on a CPU
    try:
        output = rewards(frames[None].to(device).float() / 255, [prompt], [{"fps": fps}])
    except (RewardError, RewardPlacementError, ValueError) as error:
        raise UserError(f"{name}: {one_line(error)}") from error
    except Exception as error:
        raise UserError(f"{name}: a reward failed: {summarize_exception(error)}") from error
    scores = {name: values.item() for name, values in output.scores.items()}
    if len(scores) > 1:
        scores["reward"] = output.total.item()
    return {
        "fps": fps,
        "num_frames": len(frames),
        "scores": scores,
        "info": {name: values.item() for name, values in output.info.items()},
    }


def is_cut_off(path: Path) -> bool:
    """Whether an MP4 or QuickTime file ends before its frames do: between two of them, ffmpeg says nothing.

    It is a row of boxes (ISO/IEC 14496-12, 4.2): size in bytes, type, content; the frames are in `mdat`.
    """
    size, position = path.stat().st_size, 0
    with path.open("rb") as file:
        while len(header := file.read(16)) == 16:
            length, kind, long = struct.unpack(">I4sQ", header)
            length = long if length == 1 else length
            if kind == b"mdat" and position + length > size:
                return True
            if length < 8:  # up to the end, or no box
                break
            position = file.seek(position + min(length, size))
    return False


def read_video(path: Path) -> tuple[torch.Tensor, float]:
    """All frames of a video as uint8 `(F, 3, H, W)`, and how many there are a second. The file is a whole video."""
    with as_user_error(f"{path} cannot be read as a whole video"):
        if is_cut_off(path):
            raise ValueError("its end is missing.")
    # `file:`, for a name may have a colon.
    url, only = f"file:{path}", ["-format_whitelist", FORMATS, "-protocol_whitelist", "file"]
    # What comes before the damage would be read without a word. Matroska files that end early have no other error.
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-xerror", "-nostdin", *only, "-i", url]
    check = subprocess.run([*command, "-map", "0:v:0", "-f", "null", "-"], capture_output=True)
    if check.returncode or check.stderr:
        lines = check.stderr.decode(errors="replace").splitlines() or [f"ffmpeg gave {check.returncode}"]
        raise UserError(f"{path} cannot be read as a whole video: {lines[0].rpartition('] ')[2][:200].rstrip('.')}.")
    try:
        pieces: Iterator = imageio_ffmpeg.read_frames(url, input_params=only)
        meta = next(pieces)
        width, height = meta["size"]
        frames = [np.frombuffer(piece, np.uint8).reshape(height, width, 3) for piece in pieces]
    except (OSError, RuntimeError, StopIteration) as error:
        raise UserError(f"{path} cannot be read as a video: {one_line(error)[-200:]}") from error
    if not frames:
        raise UserError(f"{path} has no frames.")
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2), meta["fps"]
