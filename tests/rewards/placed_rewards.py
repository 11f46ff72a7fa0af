"""Rewards for the tests of other processes and of servers, named by their dotted path."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from astrolabe_diffusers.rewards import FrameRequest, Reward, RewardOutput
from astrolabe_diffusers.rewards.placement.local import LocalRewards
from astrolabe_diffusers.rewards.placement.wire import ScoringJob


OBEYS = f"{__name__}:obeys"


def first_pixel(videos, prompts, metadata, scale: float = 1.0):
    """What the video, its prompt and its metadata say of themselves: any mix-up of videos shows."""
    digits = [float(prompt.split()[-1]) for prompt in prompts]
    numbers = [entry["number"] for entry in metadata]
    return scale * videos[:, 0, 0, 0, 0], {
        "prompt": digits,
        "metadata": numbers,
        "process": [os.getpid()] * len(videos),
    }


class Before(Reward):
    """The mean level of each frame before the video, so many of them, and how many there were."""

    num_context_frames = 3

    def score(self, videos, prompts, metadata=None, *, context):
        assert context.dtype == torch.uint8 and context.shape[2:] == videos.shape[2:]
        levels = context.float().mean((2, 3, 4)) @ 1000.0 ** torch.arange(context.shape[1]).float()
        return RewardOutput(levels, {"frames": torch.full((len(videos),), float(context.shape[1]))})


class EndFrames(Reward):
    """First and last frame of at most 50, at half size; says what it was given."""

    def request(self, num_frames, height, width):
        if num_frames > 50:
            raise ValueError(f"it takes 50 frames, not {num_frames}.")
        return FrameRequest((0, num_frames - 1), ((height // 2, width // 2),))

    def score(self, videos, prompts, metadata=None):
        assert videos.dtype == torch.uint8
        shape = {name: torch.full((len(videos),), float(n)) for name, n in zip("FCHW", videos.shape[1:])}
        return RewardOutput(videos.float().mean((1, 2, 3, 4)) / 255, shape)


class GrayEnds(EndFrames):
    """The same without colour."""

    def request(self, num_frames, height, width):
        return FrameRequest((0, num_frames - 1), ((height // 2, width // 2),), gray=True)


class Every(Reward):
    """Every frame as it is."""

    def request(self, num_frames, height, width):
        return FrameRequest(tuple(range(num_frames)))

    def score(self, videos, prompts, metadata=None):
        return RewardOutput(videos.float().mean((1, 2, 3, 4)) / 255)


def in_place(videos, prompts, metadata):
    """Normalises frames in place, and changes all else that it is given."""
    videos.sub_(0.5).div_(0.5)
    prompts.clear()
    for entry in metadata or []:
        entry["number"] = -1
    return videos.abs().mean((1, 2, 3, 4)), {}


class InPlace(EndFrames):
    """Blackens the frames that it requested."""

    def score(self, videos, prompts, metadata=None):
        scores = videos.float().mean((1, 2, 3, 4)) / 255
        videos.zero_()
        return RewardOutput(scores)


class Bright(Reward):
    """Mean brightness; counts the videos that it was given, in all."""

    uses_prompt = False

    def __init__(self):
        self.calls = 0

    def score(self, videos, prompts, metadata=None):
        self.calls += len(videos)
        return RewardOutput(videos.mean((1, 2, 3, 4)))


class Scaled(Reward):
    """Mean brightness, by a factor."""

    def __init__(self, scale=1.0):
        self.scale = scale

    def score(self, videos, prompts, metadata=None):
        return RewardOutput(self.scale * videos.mean((1, 2, 3, 4)))

    def to(self, device):
        return self


class Learned(Reward):
    """A network of two layers that share their weights."""

    def __init__(self):
        first, second = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
        second.weight = first.weight
        self.network = torch.nn.Sequential(first, second)

    def score(self, videos, prompts, metadata=None):
        weight = self.network[0].weight
        return RewardOutput(torch.full((len(videos),), float(weight.device.type == "cpu")))


class Where(Reward):
    """Says where it is, and cannot score there."""

    def __init__(self):
        self.network = torch.nn.Linear(2, 2)

    def score(self, videos, prompts, metadata=None):
        raise LookupError(f"videos on {videos.device}, weights on {self.network.weight.device}")


class LoadsOnce(Bright):
    """Needs for ever to be made a second time, as `file` shows."""

    def __init__(self, file: str):
        super().__init__()
        if Path(file).exists():
            Path(file).write_text("again")
            time.sleep(600)
        Path(file).touch()


def obeys(videos, prompts, metadata):
    """Does what the metadata of the first video says, if it says something."""
    act, _, argument = metadata[0].get("act", "").partition(" ")
    if act == "die_once" and not Path(argument).exists():
        Path(argument).touch()
        os.kill(os.getpid(), signal.SIGKILL)  # as a machine does that is short of memory
    if act == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if act == "exit":
        sys.exit(3)
    if act == "hang":
        time.sleep(600)
    if act == "wait":
        time.sleep(float(argument))
    if act == "refuse":
        raise ValueError("it takes no such videos.")
    if act == "fail":
        raise ArithmeticError("too dark")
    scores, info = first_pixel(videos, prompts, metadata)
    if act == "nan":
        scores[-1] = math.nan
    return (scores[1:] if act == "too_few" else scores), info


def middle(videos, prompts, metadata):
    """A pixel of the last frame; dies where the metadata says so."""
    if any(entry.get("act") == "die" for entry in metadata):
        os.kill(os.getpid(), signal.SIGKILL)
    return videos[:, -1, 0, 16, 16], {}


def make_batch(numbers, frames: int = 3, size: int = 4, act: str = ""):
    """Videos whose first pixel, prompt and metadata are the same number, of 255; `act` is what `obeys` is to do."""
    videos = torch.rand(len(numbers), frames, 3, size, size)
    videos[:, 0, 0, 0, 0] = torch.tensor(numbers, dtype=torch.float32) / 255
    videos = (videos * 255).round() / 255
    return videos, [f"video {n}" for n in numbers], [{"number": n, "act": act} for n in numbers]


def assert_own_scores(output, name: str, numbers):
    """Every video has its own score and parts."""
    torch.testing.assert_close(output.scores[name], torch.tensor(numbers, dtype=torch.float32) / 255)
    for part in ("prompt", "metadata"):
        assert output.info[f"{name}/{part}"].tolist() == [float(n) for n in numbers]


def make_job(numbers, act="", size=4):
    videos, prompts, metadata = make_batch(numbers, size=size, act=act)
    return ScoringJob.make(videos, {OBEYS: None}, prompts, metadata)


class Recorded(LocalRewards):
    """Notes the prompts that are scored together, and waits for `go` before the first."""

    def __init__(self):
        super().__init__([OBEYS])
        self.batches, self.go, self.started = [], threading.Event(), threading.Event()

    def score_job(self, job):
        self.started.set()
        assert self.go.wait(20)
        self.batches.append([int(prompt.split()[-1]) for prompt in job.prompts])
        return super().score_job(job)
