"""The current policy on held-out prompts, always with the same seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers.utils import export_to_video

from .plots import before_after_video, contact_sheet
from .policies import use_policy
from .prompts import Sample, process_batches
from .rollout import PromptEncoder, RewardWorker, decode_videos, gather_scores, generate, sample_latents


@dataclass
class Evaluation:
    """Scores of one evaluation: for every name one value a held-out video, always in the same order.

    A NaN, of a video that a reward could not score, is left out of means.
    """

    step: int
    scores: dict[str, list[float]]

    def mean(self, name: str = "reward") -> float:
        return torch.tensor(self.scores[name], dtype=torch.float64).nanmean().item()

    def to_json(self) -> dict:
        return {**asdict(self), "mean": {name: self.mean(name) for name in self.scores}}


def paired_difference(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Mean of `after - before` over pairs, and half its 95 % interval (normal approximation). NaN is left out."""
    differences = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    differences = differences[~differences.isnan()]
    half_width = 1.96 * differences.std().item() / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return differences.mean().item(), half_width


def evaluate(
    pipeline,
    encoder: PromptEncoder,
    worker: RewardWorker,
    samples: Sequence[Sample],
    size: dict[str, int],
    batch_size: int,
    step: int,
    process_index: int,
    num_processes: int,
    video_dir: Path | None = None,
    num_videos: int = 0,
) -> tuple[Evaluation, dict[int, torch.Tensor]]:
    """Generate and score the held-out videos with the active policy, split over the processes.

    Args:
        samples: all held-out videos.
        video_dir: folder for the first `num_videos` of them as MP4.

    Returns:
        The evaluation, in every process, and by index those first videos `(F, 3, H, W)` in [0, 1] that were made here.
    """
    batches = process_batches(samples, batch_size, process_index, num_processes)
    keep = {sample.key: i for i, sample in enumerate(samples[:num_videos])}
    generated = list(generate(pipeline, encoder, worker, batches, size, watched=True, keep=keep))
    scores, _ = gather_scores(generated, samples)
    kept = {keep[key]: video for batch in generated for key, video in batch.scores.result().videos.items()}
    for index, video in kept.items():
        video_dir.mkdir(parents=True, exist_ok=True)
        save_video(video, video_dir / f"{index:03d}.mp4", pipeline.config.frame_rate)
    return Evaluation(step, {name: column.tolist() for name, column in scores.items()}), kept


def save_video(video: torch.Tensor, path: Path, frame_rate: int):
    """Writes a video `(F, 3, H, W)` in [0, 1] as MP4."""
    export_to_video(list(video.permute(0, 2, 3, 1).numpy()), str(path), fps=frame_rate)


def compare_videos(
    pipeline,
    transformer: torch.nn.Module,
    encoder: PromptEncoder,
    samples: Sequence[Sample],
    size: dict[str, int],
    batch_size: int,
    output_dir: Path,
) -> dict[str, str]:
    """Writes a video and a contact sheet of `samples` before (by the reference policy) and after training.

    Returns:
        The paths of the files by what they are.
    """
    if not samples:
        return {}
    before, after = [], []
    for policy, videos in (("reference", before), ("current", after)):
        with use_policy(transformer, policy):
            for batch in process_batches(samples, batch_size, process_index=0, num_processes=1):
                prompt_embeds = encoder(sample.prompt.text for sample in batch)
                latents = sample_latents(pipeline, prompt_embeds, batch, size)
                videos += decode_videos(pipeline.vae, latents).cpu()
    files = {
        "before/after video": str(output_dir / "before_after.mp4"),
        "before/after sheet": str(output_dir / "before_after.png"),
    }
    frames = before_after_video(before, after)
    export_to_video(frames, files["before/after video"], fps=pipeline.config.frame_rate)
    contact_sheet(before, after, [sample.prompt.text for sample in samples]).save(files["before/after sheet"])
    return files
