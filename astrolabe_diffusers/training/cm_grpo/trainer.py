"""CM-GRPO: the current policy samples, and the noise of its own steps is made likelier where the reward was high."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...errors import UserError
from ...rollout.samples import VideoBatch
from ...rollout.seeds import seeded_generator
from ..forward_process.gradient import backward_by_block
from ..forward_process.noising import NoisedBatch, per_sample, squared_distance
from ..forward_process.predictors import predictor_class
from ..forward_process.trainer import BlockwiseTrainer
from .config import CMGRPOConfig


@dataclass(kw_only=True)
class CMGRPOBatch(NoisedBatch):
    """A step of the sampler as it was taken, of every block of the window: from `noisy` to `following`."""

    following: torch.Tensor  # `(B, C, W, h, w)`
    following_sigma: torch.Tensor  # `(B,)`, its noise level in (0, 1)
    advantages: torch.Tensor  # `(B,)`, clipped; 0 of a sample that is skipped


def noisy_steps(pipeline, train_steps: Sequence[int]) -> list[int]:
    """The sampler's steps that are trained, `train_steps` or all, of those that draw noise: all but the last, and one
    that goes to a level of 0."""
    count = sum(level > 0 for level in pipeline.config.sigmas[1:])
    if count < 1:
        raise UserError("cm_grpo trains the sampler's steps that draw noise: one of a single step has none.")
    if list(pipeline.config.first_block_sigmas or pipeline.config.sigmas) != list(pipeline.config.sigmas):
        raise UserError(
            "cm_grpo trains the same step of all blocks: this model's first_block_sigmas are others: set sigmas."
        )
    if unknown := set(train_steps) - set(range(count)):
        raise UserError(f"train_steps={min(unknown)}: the sampler's steps that draw noise are 0 to {count - 1}.")
    return list(train_steps) or list(range(count))


def drawn_step(batch: VideoBatch, steps: Sequence[int], block_frames: int, advantages: torch.Tensor) -> CMGRPOBatch:
    """Of every sample one of `steps`, drawn from its own generator, the same for all blocks of its window."""
    drawn = [
        steps[torch.randint(len(steps), (), generator=seeded_generator("train", *sample.key))]
        for sample in batch.samples
    ]
    # A past that is not shared has its steps in front.
    num_blocks = (batch.latents.shape[2] - batch.past.num_frames) // block_frames
    blocks, timesteps = batch.trajectory.latents[-num_blocks:], torch.stack(batch.trajectory.timesteps[-1]).float()

    def latents(offset: int) -> torch.Tensor:
        rows = [torch.cat([block[step + offset][row] for block in blocks], dim=1) for row, step in enumerate(drawn)]
        return torch.stack(rows)

    index = torch.tensor(drawn, device=timesteps.device)
    timestep = timesteps[index]
    return CMGRPOBatch(
        batch.latents,
        latents(0),
        timestep / 1000,
        timestep,
        batch.prompt_embeds,
        batch.past,
        batch.old_prompt_embeds,
        batch.pipeline,
        following=latents(1),
        following_sigma=timesteps[index + 1] / 1000,
        advantages=advantages,
    )


def step_noise(clean: torch.Tensor, following: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """`eps = (x_s - (1 - s) x_0) / s`, the noise with which the sampler went from its prediction `x_0` to `x_s`.

    `x_s` is a sample of a normal distribution of mean `(1 - s) x_0` and standard deviation `s`, whose log-density is
    `-eps^2 / 2`, up to a constant.

    Args:
        clean, following: `(B, ...)`.
        sigma: `(B,)`, the noise level s of `following`, in (0, 1).
    """
    sigma = per_sample(sigma, clean)
    return (following - (1 - sigma) * clean) / sigma


def block_weights(num_blocks: int, weighting: str) -> list[float]:
    """Weights of a window's blocks, 1 on average: `"late"`, in proportion to `1 / (N - c)`, or `"uniform"`."""
    if weighting == "uniform":
        return [1.0] * num_blocks
    shares = [1 / (num_blocks - block) for block in range(num_blocks)]
    return [share * num_blocks / sum(shares) for share in shares]


class CMGRPOTrainer(BlockwiseTrainer):
    """Trains with CM-GRPO (RAVEN, arXiv 2605.15190): see [`OnlineTrainer`] for the arguments.

    A few-step sampler draws noise of its own between its steps, which makes each a Gaussian policy: its likelihood
    needs no stochastic sampler beside it. Written from a description of the method; the authors' code was not opened.
    """

    config_class = CMGRPOConfig
    keep_trajectory = True
    config: CMGRPOConfig

    def prepare(self):
        self.steps = noisy_steps(self.pipeline, self.config.train_steps)
        super().prepare()

    def accumulate_gradients(
        self, batch: VideoBatch, values: dict[str, torch.Tensor], samples_per_step: int, synchronize: bool
    ) -> dict[str, torch.Tensor]:
        limit = self.config.adv_clip_max
        advantages = values["advantages"].clamp(-limit, limit)
        batch = drawn_step(batch, self.steps, self.transformer.config.num_frames_per_block, advantages)
        return accumulate_gradients(self.accelerator, self.model, batch, self.config, samples_per_step, synchronize)


def accumulate_gradients(
    accelerator,
    model: torch.nn.Module,
    batch: CMGRPOBatch,
    config: CMGRPOConfig,
    samples_per_step: int,
    synchronize: bool,
) -> dict[str, torch.Tensor]:
    """Add a batch's part of the gradient of the mean loss to the current policy's parameters; arguments and result as
    in [`backward_by_block`].

    The samples are the current policy's: the ratio of a PPO step is 1, and its gradient that of the log-density, of
    which this is the mean over elements.
    """
    transformer = accelerator.unwrap_model(model)
    predictor = predictor_class(config.context, batch)(transformer, batch, "current", config.num_pass_blocks)
    first, weights = batch.past.num_frames, block_weights(len(predictor.blocks), config.block_weighting)

    def targets(frames: slice) -> torch.Tensor | None:
        return predictor.predict_as("base", frames) if config.kl_weight else None

    def losses(current: torch.Tensor, base: torch.Tensor | None, frames: slice) -> dict[str, torch.Tensor]:
        weight = weights[predictor.blocks.index(frames)]
        following = batch.following[:, :, frames.start - first : frames.stop - first]
        noise = step_noise(current, following, batch.following_sigma).square().flatten(1).mean(1)
        policy_loss = weight * batch.advantages * noise / 2
        kl = torch.zeros_like(policy_loss)
        if base is not None:
            # Of the means of the two policies.
            kl = (1 - batch.following_sigma).square() * squared_distance(current, base)
        return {
            "loss": policy_loss + config.kl_weight * kl,
            "policy_loss": policy_loss,
            "kl": kl,
            "step_noise": noise,
            "x0_norm": current.detach().square().flatten(1).mean(1),
        }

    return backward_by_block(accelerator, model, predictor, targets, losses, samples_per_step, synchronize)
