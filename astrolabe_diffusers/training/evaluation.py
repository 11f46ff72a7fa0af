"""The current policy on held-out prompts, always with the same seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object

from ..rewards.frame_request import to_uint8
from .agreement import raise_together
from .plots import comparison_video, contact_sheet, small_gif_bytes
from .prompts import Sample, process_batches
from .rollout import PromptEncoder, RewardWorker, decode_videos, gather_scores, generate, sample_latents
from .sharding import is_sharded
from .video_file import VideoWriter
from .writing import replacing, writing


@dataclass
class Evaluation:
    """Scores of one evaluation: for every name one value a held-out video, always in the same order.

    A NaN, of a video that a reward could not score, is left out of means. `step` is that of the run, if it is one.
    """

    step: int | None
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
    step: int | None,
    process_index: int,
    num_processes: int,
    video_dir: Path | None = None,
    num_videos: int = 0,
    on_batch: Callable[[int, int], object] = lambda done, total: None,
) -> tuple[Evaluation, dict[int, torch.Tensor]]:
    """Generate and score the held-out videos with the active policy, split over the processes.

    Args:
        samples: all held-out videos.
        video_dir: folder for the first `num_videos` of them as MP4.
        on_batch: called after each batch that is sampled, with their number so far and in all, in this process.

    Returns:
        The evaluation, in every process, and by index those first videos `(F, 3, H, W)` in [0, 1] that were made here.
    """
    batches = process_batches(samples, batch_size, process_index, num_processes)
    if is_sharded():
        # Every process takes part in every forward pass: one with a batch less makes a video once more.
        number = -(-len(samples) // (batch_size * num_processes))
        batches += [samples[:1]] * (number - len(batches))
    keep = {sample.key: i for i, sample in enumerate(samples[:num_videos])}
    generated = []
    with raise_together():
        for batch in generate(pipeline, encoder, worker, batches, size, watched=True, keep=keep):
            generated.append(batch)
            on_batch(len(generated), len(batches))
    scores, _ = gather_scores(generated, samples)
    kept = {keep[key]: video for batch in generated for key, video in batch.scores.result().videos.items()}
    with raise_together():
        for index, video in kept.items():
            save_video(video, video_dir / f"{index:03d}.mp4", pipeline.config.frame_rate)
    return Evaluation(step, {name: column.tolist() for name, column in scores.items()}), kept


def gather_videos(videos: dict[int, torch.Tensor], is_main_process: bool) -> list[torch.Tensor]:
    """The videos of all processes in the order of their indices, with eight bits, for the main process; none else."""
    gathered = gather_object([{index: to_uint8(video) for index, video in videos.items()}])
    if not is_main_process:
        return []
    everything = {index: video for part in gathered for index, video in part.items()}
    return [everything[index] / 255 for index in sorted(everything)]


def save_video(video: torch.Tensor, path: Path, frame_rate: int):
    """Writes a video `(F, 3, H, W)` in [0, 1] as MP4."""
    write_frames((video.permute(0, 2, 3, 1).numpy() * 255).astype(np.uint8), path, frame_rate)


def write_frames(frames: np.ndarray, path: Path, frame_rate: int):
    """Writes `frames` `(F, H, W, 3)`, uint8, as MP4; a [`UserError`] if they cannot be written."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with VideoWriter(path, *frames.shape[1:3], frame_rate) as writer:
            writer.write(frames)


def generate_columns(
    pipeline,
    policies: dict[str, AbstractContextManager],
    encoder: PromptEncoder,
    samples: Sequence[Sample],
    size: dict[str, int],
    batch_size: int,
) -> dict[str, list[torch.Tensor]]:
    """The videos `(F, 3, H, W)` in [0, 1] of `samples` under several policies, by their headings.

    Args:
        policies: by its heading, the context in which the pipeline has a policy.
    """
    columns = {}
    for name, policy in policies.items():
        with policy:
            columns[name] = []
            for batch in process_batches(samples, batch_size, process_index=0, num_processes=1):
                prompt_embeds = encoder(sample.prompt.text for sample in batch)
                latents = sample_latents(pipeline, prompt_embeds, batch, size)
                columns[name] += decode_videos(pipeline.vae, latents).cpu()
    return columns


def write_columns(
    columns: dict[str, list[torch.Tensor]], prompts: Sequence[str], path: Path, frame_rate: int
) -> list[str]:
    """Writes what [`generate_columns`] returns side by side: a video `path.mp4`, frames of it in a contact sheet
    `path.png`, and the video in small as `path.gif`. Returns the paths of these files."""
    files = [f"{path}.mp4", f"{path}.png", f"{path}.gif"]
    images = comparison_video(columns)
    write_frames(np.stack(images), Path(files[0]), frame_rate)
    with replacing(Path(files[1])) as partial:
        contact_sheet(columns, prompts).save(partial, "PNG")
    with replacing(Path(files[2])) as partial:
        partial.write_bytes(small_gif_bytes(images, frame_rate))
    return files
