"""AWM's loss: the loss of pretraining, weighted by the advantage (arXiv 2509.25050, section 4)."""

from __future__ import annotations

import torch

from ..forward_process.noising import squared_distance


def awm_loss(prediction: torch.Tensor, clean: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """`A |x_pred - x_0|^2` of each sample, `(B,)`, squares averaged over all but the batch.

    Minus its mean is the surrogate of a policy gradient, in which minus the matching loss stands for the log
    likelihood of the sample: its gradient draws the model to samples of positive advantage and pushes it away from the
    others. The samples have to be the current policy's, where the ratio of a PPO step is 1.

    Args:
        prediction, clean: `(B, ...)` the latents predicted from noisy ones, and the sample itself.
        advantages: `(B,)`.
    """
    return advantages * squared_distance(prediction, clean)
