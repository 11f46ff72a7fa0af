"""NFT: the old policy samples; the current one is drawn to good samples and pushed away from bad ones."""

from dataclasses import dataclass
from functools import partial

import torch

from ...rollout.samples import VideoBatch
from ..advantages import Advantages
from ..forward_process.gradient import backward_by_block
from ..forward_process.noising import NoisedBatch, noise_batch, squared_distance, training_sigmas
from ..forward_process.predictors import predictor_class
from ..forward_process.trainer import BlockwiseTrainer
from ..policies import OLD, REFERENCE, follow_current
from .config import NFTConfig
from .loss import nft_loss, optimality
from .reference import ReferenceSchedule, RiskController, kl_weights, rank_disagreement


@dataclass(kw_only=True)
class NFTBatch(NoisedBatch):
    optimality: torch.Tensor  # `(B,)` in [0, 1]
    weight: torch.Tensor  # `(B,)`, of the sample's loss; 0 if it is skipped
    kl_weight: torch.Tensor  # `(B,)`, of its distance to the reference; 0 if it is not held to it
    use_reference: bool = True  # whether a sample of this batch has a `kl_weight`, here or on another process
    old_is_current: bool = False  # whether the old policy's weights are the current one's


class NFTTrainer(BlockwiseTrainer):
    """Trains with NFT (Astrolabe, arXiv 2603.17051): see [`OnlineTrainer`] for the arguments.

    After an epoch the old policy, which samples, follows the current one; the reference, to which samples are held by
    the KL term, may follow now and then.
    """

    config_class = NFTConfig
    sampling_policy = "old"
    config: NFTConfig

    def prepare(self):
        self.risk, self.reference = RiskController(self.config), ReferenceSchedule(self.config)
        self.sigmas = training_sigmas(self.pipeline, self.config.train_timesteps, self.config.train_steps)
        super().prepare()

    def make_state(self):
        return super().make_state() | {"risk": self.risk, "reference": self.reference}

    def sample_values(self, scores: dict[str, torch.Tensor], advantages: Advantages) -> dict[str, torch.Tensor]:
        config = self.config
        held = self.held_to_reference(scores, advantages.valid)
        self.kl_samples = held.float().mean().item()
        # Samples are in the order of global batches, each of them one batch of every process after the other.
        parts = {"selected": config.steps_per_epoch, "batch": len(held) // config.train_batch_size}
        # Processes must agree on the passes that they make.
        global_batches = held.unflatten(0, (config.batches_per_epoch, -1))
        use_reference = global_batches.any(1, keepdim=True).expand_as(global_batches).flatten()
        return {
            "optimality": optimality(advantages.values, config.adv_clip_max),
            "weight": advantages.trained.float(),
            "kl_weight": kl_weights(held, parts[config.kl_average]),
            "use_reference": use_reference,
        }

    def held_to_reference(self, scores: dict[str, torch.Tensor], valid: torch.Tensor) -> torch.Tensor:
        """The samples `(N,)` that have a KL term, bool."""
        if not self.config.selective_kl:
            return valid
        others = [scores[name][valid] for name in self.config.rewards if name != self.primary_reward]
        mask = torch.zeros_like(valid)
        mask[valid] = self.risk(rank_disagreement(scores[self.primary_reward][valid], others))
        return mask

    def accumulate_gradients(
        self, batch: VideoBatch, values: dict[str, torch.Tensor], samples_per_step: int, synchronize: bool
    ) -> dict[str, torch.Tensor]:
        values = values | {"use_reference": bool(values["use_reference"].any()), "old_is_current": self.old_is_current}
        batch = NFTBatch(**vars(noise_batch(batch, self.sigmas)), **values)
        return accumulate_gradients(self.accelerator, self.model, batch, self.config, samples_per_step, synchronize)

    def after_epoch(self, statistics: list[dict[str, float]]):
        follow_current(self.transformer, OLD, self.old_policy_decay)
        if self.reference.step(sum(s["kl"] for s in statistics) / len(statistics)):
            follow_current(self.transformer, REFERENCE, decay=0.0)

    @property
    def old_is_current(self) -> bool:
        """Whether both predict the same: in an epoch's first step, if the old policy follows at once."""
        config = self.config
        follows = not (config.old_policy_decay_rate and config.old_policy_decay_max)
        return follows and not config.lora_dropout and self.step % config.steps_per_epoch == 0

    @property
    def old_policy_decay(self) -> float:
        """`min(rate * step, maximum)`: the old policy follows closely at first (DiffusionNFT's schedule)."""
        return min(self.config.old_policy_decay_rate * self.step, self.config.old_policy_decay_max)

    def metrics(self) -> dict[str, float]:
        metrics = {"kl_samples": self.kl_samples, "reference_age": self.reference.age}
        if self.config.selective_kl:
            metrics["risk_ratio"] = self.risk.ratio
        if self.reference.max_kl is not None:
            metrics["reference_reset_kl"] = self.reference.max_kl
        return metrics | {"old_policy_decay": self.old_policy_decay}


def accumulate_gradients(
    accelerator, model: torch.nn.Module, batch: NFTBatch, config: NFTConfig, samples_per_step: int, synchronize: bool
) -> dict[str, torch.Tensor]:
    """[`backward_by_block`] with the loss, its two parts, and the squares of `deviation`, the distance of the
    predictions of current and old policy, and of `x0_norm`, the current one's predictions."""
    transformer = accelerator.unwrap_model(model)
    predictor = predictor_class(config.context, batch)
    make_predictor = partial(predictor, transformer, batch, blocks_per_pass=config.num_pass_blocks)
    frozen = ["old"] * (not batch.old_is_current) + ["reference"] * bool(batch.use_reference and config.kl_weight)
    # One past for all policies, and one cache; or each its own, one after the other, and one cache at a time.
    shared = config.context_policy == "old"
    own = {} if shared else {policy: make_predictor(past_policy=policy).predict_window() for policy in frozen}
    predictor = make_predictor(past_policy="old" if shared else "current")

    def targets(frames: slice) -> dict[str, torch.Tensor]:
        if shared:
            return {policy: predictor.predict_as(policy, frames) for policy in frozen}
        return {policy: predictions[frames.start] for policy, predictions in own.items()}

    def losses(current: torch.Tensor, frozen: dict[str, torch.Tensor], frames: slice) -> dict[str, torch.Tensor]:
        old = frozen.get("old", current.detach())
        policy_loss = nft_loss(
            current,
            old,
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
            "deviation": squared_distance(current.detach(), old),
            "x0_norm": current.detach().square().flatten(1).mean(1),
        }

    return backward_by_block(accelerator, model, predictor, targets, losses, samples_per_step, synchronize)
