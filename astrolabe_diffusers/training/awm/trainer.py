"""AWM: the current policy samples and learns to reproduce what it made, weighted by the advantage."""

from dataclasses import dataclass

import torch

from ...rollout.samples import VideoBatch
from ..forward_process.gradient import backward_by_block
from ..forward_process.noising import NoisedBatch, noise_batch, squared_distance, training_sigmas
from ..forward_process.predictors import predictor_class
from ..forward_process.trainer import BlockwiseTrainer
from .config import AWMConfig


@dataclass(kw_only=True)
class AWMBatch(NoisedBatch):
    advantages: torch.Tensor  # `(B,)`, clipped; 0 of a sample that is skipped


def awm_loss(prediction: torch.Tensor, clean: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """`A |x_pred - x_0|^2` of each sample, `(B,)`, squares averaged over all but the batch (section 4 of the paper).

    Minus its mean is the surrogate of a policy gradient, in which minus the matching loss stands for the log
    likelihood of the sample: its gradient draws the model to samples of positive advantage and pushes it away from the
    others. The samples have to be the current policy's, where the ratio of a PPO step is 1.

    Args:
        prediction, clean: `(B, ...)` the latents predicted from noisy ones, and the sample itself.
        advantages: `(B,)`.
    """
    return advantages * squared_distance(prediction, clean)


class AWMTrainer(BlockwiseTrainer):
    """Trains with AWM (arXiv 2509.25050): see [`OnlineTrainer`] for the arguments.

    There is no old policy. Samples whose advantage is negative have no lower bound to their loss: `kl_weight` and
    small steps keep the policy near the reference, the model alone.
    """

    config_class = AWMConfig
    config: AWMConfig

    def prepare(self):
        self.sigmas = training_sigmas(self.pipeline, self.config.train_timesteps, self.config.train_steps)
        super().prepare()

    def accumulate_gradients(
        self, batch: VideoBatch, values: dict[str, torch.Tensor], samples_per_step: int, synchronize: bool
    ) -> dict[str, torch.Tensor]:
        limit = self.config.adv_clip_max
        advantages = values["advantages"].clamp(-limit, limit)
        batch = AWMBatch(**vars(noise_batch(batch, self.sigmas)), advantages=advantages)
        return accumulate_gradients(self.accelerator, self.model, batch, self.config, samples_per_step, synchronize)


def accumulate_gradients(
    accelerator, model: torch.nn.Module, batch: AWMBatch, config: AWMConfig, samples_per_step: int, synchronize: bool
) -> dict[str, torch.Tensor]:
    """Add a batch's part of the gradient of the mean loss to the current policy's parameters; arguments and result as
    in [`backward_by_block`]."""
    transformer = accelerator.unwrap_model(model)
    predictor = predictor_class(config.context, batch)(transformer, batch, "current", config.num_pass_blocks)
    # The paper's distances are of flows; a flow's error is that of the clean latents over the noise level.
    scale = 1 / batch.sigma.square()

    def targets(frames: slice) -> torch.Tensor | None:
        return predictor.predict_as("base", frames) if config.kl_weight else None

    def losses(current: torch.Tensor, base: torch.Tensor | None, frames: slice) -> dict[str, torch.Tensor]:
        policy_loss = scale * awm_loss(current, batch.clean[:, :, frames], batch.advantages)
        kl = torch.zeros_like(policy_loss) if base is None else scale * squared_distance(current, base)
        return {
            "loss": policy_loss + config.kl_weight * kl,
            "policy_loss": policy_loss,
            "kl": kl,
            "x0_norm": current.detach().square().flatten(1).mean(1),
        }

    return backward_by_block(accelerator, model, predictor, targets, losses, samples_per_step, synchronize)
