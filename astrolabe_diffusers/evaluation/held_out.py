"""The current policy on held-out prompts, always with the same seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from accelerate.utils import gather_object

from ..distributed.agreement import raise_together
from ..distributed.sharding import is_sharded
from ..reporting.comparison import Evaluation
from ..reporting.videos import save_video
from ..rewards.frames import to_uint8
from ..rollout.samples import Sample, process_batches
from ..rollout.sampling import Rollout, Sampler
from ..rollout.scoring import decode_videos, gather_scores


def evaluate(
    rollout: Rollout,
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
        for batch in rollout.generate(batches, size, watched=True, keep=keep):
            generated.append(batch)
            on_batch(len(generated), len(batches))
    scores, _ = gather_scores(generated, samples)
    kept = {keep[key]: video for batch in generated for key, video in batch.scores.result().videos.items()}
    with raise_together():
        for index, video in kept.items():
            save_video(video, video_dir / f"{index:03d}.mp4", rollout.pipeline.config.frame_rate)
    return Evaluation(step, {name: column.tolist() for name, column in scores.items()}), kept


def gather_videos(videos: dict[int, torch.Tensor], is_main_process: bool) -> list[torch.Tensor]:
    """The videos of all processes in the order of their indices, with eight bits, for the main process; none else."""
    gathered = gather_object([{index: to_uint8(video) for index, video in videos.items()}])
    if not is_main_process:
        return []
    everything = {index: video for part in gathered for index, video in part.items()}
    return [everything[index] / 255 for index in sorted(everything)]


def generate_columns(
    rollout: Rollout,
    policies: dict[str, AbstractContextManager],
    samples: Sequence[Sample],
    size: dict[str, int],
    batch_size: int,
) -> dict[str, list[torch.Tensor]]:
    """The videos `(F, 3, H, W)` in [0, 1] of `samples` under several policies, by their headings.

    Args:
        policies: by its heading, the context in which the pipeline has a policy.
    """
    columns, sampler = {}, Sampler(rollout.pipeline, size)
    for name, policy in policies.items():
        with policy:
            columns[name] = []
            for batch in process_batches(samples, batch_size, process_index=0, num_processes=1):
                latents, _ = sampler(rollout.encoder(sample.prompt.text for sample in batch), batch)
                columns[name] += decode_videos(rollout.pipeline.vae, latents).cpu()
    return columns
