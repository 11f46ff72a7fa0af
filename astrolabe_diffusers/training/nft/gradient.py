"""The gradient of NFT's loss on a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..forward_process.gradient import backward_by_block
from ..forward_process.noising import NoisedBatch, squared_distance
from ..forward_process.predictors import PREDICTORS
from .config import NFTConfig
from .loss import nft_loss


@dataclass(kw_only=True)
class NFTBatch(NoisedBatch):
    optimality: torch.Tensor  # `(B,)` in [0, 1]
    weight: torch.Tensor  # `(B,)`, of the sample's loss; 0 if it is skipped
    kl_weight: torch.Tensor  # `(B,)`, of its distance to the reference; 0 if it is not held to it
    use_reference: bool = True  # whether a sample of this batch has a `kl_weight`, here or on another process


def accumulate_gradients(
    accelerator, model: torch.nn.Module, batch: NFTBatch, config: NFTConfig, samples_per_step: int, synchronize: bool
) -> dict[str, torch.Tensor]:
    """[`backward_by_block`] with the loss, its two parts, and the squares of `deviation`, the distance of the
    predictions of current and old policy, and of `x0_norm`, the current one's predictions."""
    transformer = accelerator.unwrap_model(model)
    predictor_class = PREDICTORS[config.context]
    frozen = ["old"] + ["reference"] * bool(batch.use_reference and config.kl_weight)
    # One past for all policies, and one cache; or each its own, one after the other, and one cache at a time.
    shared = config.context_policy == "old"
    own = {} if shared else {policy: predictor_class(transformer, batch, policy).predict_window() for policy in frozen}
    predictor = predictor_class(transformer, batch, past_policy="old" if shared else "current")

    def targets(frames: slice) -> dict[str, torch.Tensor]:
        if shared:
            return {policy: predictor.predict_as(policy, frames) for policy in frozen}
        return {policy: predictions[frames.start] for policy, predictions in own.items()}

    def losses(current: torch.Tensor, frozen: dict[str, torch.Tensor], frames: slice) -> dict[str, torch.Tensor]:
        policy_loss = nft_loss(
            current,
            frozen["old"],
            batch.clean[:, :, frames],
            batch.optimality,
            config.beta,
            adaptive=config.adv_clip_max if config.loss_weighting == "adaptive" else None,
        )
        kl = torch.zeros_like(policy_loss)
        if "reference" in frozen:
            kl = batch.kl_weight * squared_distance(current, frozen["reference"])
        return {
            "loss": batch.weight * policy_loss + config.kl_weight * kl,
            "policy_loss": policy_loss,
            "kl": kl,
            "deviation": squared_distance(current.detach(), frozen["old"]),
            "x0_norm": current.detach().square().flatten(1).mean(1),
        }

    return backward_by_block(accelerator, model, predictor, targets, losses, samples_per_step, synchronize)
