"""Several rewards as one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .reward import RewardError, get_reward


@dataclass
class RewardSetOutput:
    """
    Attributes:
        total: float32 tensor [B] on the CPU, the weighted sum of the raw scores.
        scores: the raw scores [B] of each reward.
        info: the parts [B] of each reward as "reward/part".
    """

    total: torch.Tensor
    scores: dict[str, torch.Tensor]
    info: dict[str, torch.Tensor]


class RewardSet:
    """
    Scores videos by several rewards and adds them up, each on its raw scale.

    Args:
        weights: reward name or dotted path (see `get_reward`) -> weight. A reward of weight 0 is measured and logged
            but does not count.
    """

    def __init__(self, weights: dict[str, float]):
        if not weights:
            raise ValueError("no reward is named; give at least one, such as {'motion_smoothness': 1.0}.")
        self.weights = dict(weights)
        self.rewards = {name: get_reward(name) for name in self.weights}

    def __call__(
        self, videos: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None
    ) -> RewardSetOutput:
        """
        Args:
            videos: float tensor [B, F, C, H, W] in [0, 1].
            prompts: B prompts.
            metadata: B dicts or `None`.

        Raises:
            RewardError: a reward returned anything but one finite score a video.
            ValueError: the batch is not what a reward can take.
        """
        if videos.ndim != 5 or len(prompts) != len(videos):
            raise ValueError(
                f"videos must be [B, F, C, H, W] with one prompt each; got {tuple(videos.shape)} and "
                f"{len(prompts)} prompts."
            )
        # Grad mode belongs to a thread, so what the caller set does not hold in a worker.
        with torch.inference_mode():
            outputs = {name: reward.score(videos, prompts, metadata) for name, reward in self.rewards.items()}

        scores, info = {}, {}
        for name, output in outputs.items():
            scores[name] = _plain(output.scores, f"reward {name!r}", len(prompts))
            bad = (~scores[name].isfinite()).nonzero().flatten().tolist()
            if bad:
                raise RewardError(
                    f"reward {name!r} gave {scores[name][bad[0]].item()} for sample {bad[0]}, prompt "
                    f"{prompts[bad[0]]!r} ({len(bad)} of {len(prompts)} scores are not finite)."
                )
            for part, values in output.info.items():
                info[f"{name}/{part}"] = _plain(values, f"info {part!r} of reward {name!r}", len(prompts))
        total = sum(weight * scores[name] for name, weight in self.weights.items())
        return RewardSetOutput(total=total, scores=scores, info=info)


def _plain(values: torch.Tensor, what: str, batch_size: int) -> torch.Tensor:
    if tuple(values.shape) != (batch_size,):
        raise RewardError(f"{what} must hold one number a video, [{batch_size}], but has shape {list(values.shape)}.")
    # An inference tensor may not enter a loss; its clone made out here may.
    return values.to("cpu", torch.float32).clone()
