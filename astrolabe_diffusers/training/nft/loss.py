"""The NFT loss (DiffusionNFT, arXiv 2509.16117) in the space of clean latents (Astrolabe, arXiv 2603.17051)."""

import torch

from ..forward_process.noising import squared_distance


# Of DiffusionNFT's adaptive weights, as in its code.
MIN_DISTANCE = 1e-5


def optimality(advantages: torch.Tensor, adv_clip_max: float) -> torch.Tensor:
    """`r = clip(A, -A_max, A_max) / (2 A_max) + 1/2`, in [0, 1]: how much a sample counts as a good one. `(B,)`."""
    return advantages.clamp(-adv_clip_max, adv_clip_max) / (2 * adv_clip_max) + 0.5


def nft_loss(
    current: torch.Tensor,
    old: torch.Tensor,
    clean: torch.Tensor,
    optimality: torch.Tensor,
    beta: float,
    adaptive: float | None = None,
) -> torch.Tensor:
    """Policy loss of each sample, `(B,)`; Astrolabe eq. 1-2 and algorithm 1.

    `r |x+ - x_0|^2 + (1 - r) |x- - x_0|^2`, squares averaged over all but the batch, with the implicit policies
    `x+ = (1 - beta) x_old + beta x_cur` and `x- = (1 + beta) x_old - beta x_cur`.

    Args:
        current, old: `(B, ...)` clean latents that the two policies predict from the same noisy ones.
        clean: `(B, ...)` the sample itself.
        optimality: `(B,)` r in [0, 1].
        adaptive:
            A_max of `optimality`, for DiffusionNFT's loss: each square is divided by the mean distance `|x+ - x_0|`
            (or `|x- - x_0|`), and the sum multiplied by `A_max / beta`.
    """
    positive = (1 - beta) * old + beta * current
    negative = (1 + beta) * old - beta * current
    losses = []
    for prediction in (positive, negative):
        loss = squared_distance(prediction, clean)
        if adaptive is not None:
            loss = loss / (prediction - clean).detach().abs().flatten(1).mean(1).clamp(min=MIN_DISTANCE)
        losses.append(loss)
    loss = optimality * losses[0] + (1 - optimality) * losses[1]
    return loss if adaptive is None else adaptive / beta * loss
