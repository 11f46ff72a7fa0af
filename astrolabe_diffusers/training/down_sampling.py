"""Which videos of a batch are trained, and how often."""

from dataclasses import replace

import torch

from ..rollout.samples import VideoBatch
from .config import OnlineConfig


def trained_part(
    batch: VideoBatch, advantages: torch.Tensor, values: dict[str, torch.Tensor], config: OnlineConfig
) -> tuple[VideoBatch, dict[str, torch.Tensor]]:
    """
    Of a batch the videos from which most is learnt, each as often as it is drawn, and their part of `values` `(B,)`,
    on the batch's device.

    These are the best and the worst, those whose `advantages` `(B,)` are farthest from 0, `trained_fraction` of the
    batch: the others add little to the gradient but noise (after PODS, arXiv 2504.13818, which takes those whose
    rewards vary most). As many in every batch, so that processes go on making the same passes.
    """
    device = batch.latents.device
    videos = advantages.abs().topk(config.trained_videos).indices.sort().values
    rows = videos.repeat(config.draws_per_video)
    if config.trained_fraction < 1 or config.draws_per_video > 1:
        chosen = [batch.samples[video] for video in videos]
        samples = list(chosen)
        # Each draw has random numbers of its own; the first has those of a single one.
        for draw in range(1, config.draws_per_video):
            samples += [replace(sample, key=(*sample.key, draw)) for sample in chosen]
        batch = batch.map(samples, lambda x: x[rows.to(x.device)])
    return batch, {name: column[rows].to(device) for name, column in values.items()}
