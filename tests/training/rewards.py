"""Rewards for the tests of the trainer, named in configurations by their dotted path."""

from __future__ import annotations

import math

import torch


def brightness(videos, prompts, metadata):
    """Mean of all pixels; its parts are the means of the colour channels."""
    means = videos.mean(dim=(1, 3, 4))
    return means.mean(1), {name: means[:, i] for i, name in enumerate(("red", "green", "blue"))}


def contrast(videos, prompts, metadata):
    return videos.flatten(1).std(1), None


def nan_for_bright(videos, prompts, metadata):
    """NaN where the first pixel is above 1/2."""
    scores = videos.flatten(1).mean(1)
    return torch.where(videos[:, 0, 0, 0, 0] > 0.5, math.nan, scores), None


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
