"""Rewards for the tests of the trainer, named in configurations by their dotted path."""

from __future__ import annotations

import math
import os
import resource
import signal
import threading
from pathlib import Path

import torch


def brightness(videos, prompts, metadata):
    """Mean of all pixels; its parts are the means of the colour channels."""
    means = videos.mean(dim=(1, 3, 4))
    return means.mean(1), {name: means[:, i] for i, name in enumerate(("red", "green", "blue"))}


def contrast(videos, prompts, metadata, scale=1.0):
    return scale * videos.flatten(1).std(1), None


def nan_for_bright(videos, prompts, metadata):
    """NaN where the first pixel is above 1/2."""
    scores = videos.flatten(1).mean(1)
    return torch.where(videos[:, 0, 0, 0, 0] > 0.5, math.nan, scores), None


def none_for_bright(videos, prompts, metadata):
    """The same with None, in a list."""
    scores, _ = nan_for_bright(videos, prompts, metadata)
    return [None if math.isnan(score) else score for score in scores.tolist()]


def sometimes_nan(videos, prompts, metadata):
    """NaN for about half of all videos, by a digit of their brightness."""
    scores = videos.flatten(1).mean(1)
    return torch.where((1e5 * scores).long() % 2 == 1, math.nan, scores), None


def always_nan(videos, prompts, metadata):
    return torch.full((len(videos),), math.nan), None


def broken(videos, prompts, metadata):
    raise ZeroDivisionError("a reward that\ncannot work")


def frame_count(videos, prompts, metadata):
    return torch.full((len(videos),), float(videos.shape[1])), {}


def hangs(videos, prompts, metadata):
    threading.Event().wait()


def hangs_at_dark(videos, prompts, metadata):
    return hangs(videos, prompts, metadata) if videos.mean() < 0.3 else brightness(videos, prompts, metadata)


# What follows is a brightness that does something else at its call number $TROUBLE_CALL in process $TROUBLE_RANK.
_calls = 0


def _in_trouble() -> bool:
    global _calls
    _calls += 1
    here = os.environ.get("RANK", "0") == os.environ.get("TROUBLE_RANK", "0")
    return here and _calls == int(os.environ["TROUBLE_CALL"])


def sends_a_signal(videos, prompts, metadata):
    """Once in a run: what was resumed has a file that says so."""
    mark = Path(os.environ["TROUBLE_MARK"])
    if _in_trouble() and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.Signals[os.environ["TROUBLE_SIGNAL"]])
    return brightness(videos, prompts, metadata)


def dies(videos, prompts, metadata):
    if _in_trouble():
        os._exit(1)
    return brightness(videos, prompts, metadata)


def hangs_once(videos, prompts, metadata):
    return hangs(videos, prompts, metadata) if _in_trouble() else brightness(videos, prompts, metadata)


def exits(videos, prompts, metadata):
    raise SystemExit(0)


def fills_the_disk(videos, prompts, metadata):
    if _in_trouble():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))  # bytes of a file
    return brightness(videos, prompts, metadata)
