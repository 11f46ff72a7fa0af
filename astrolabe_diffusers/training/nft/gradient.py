"""One optimizer step of NFT."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from ...distributed.sharding import full_tensor
from ...errors import UserError
from ...rollout.samples import Sample, VideoBatch
from ...rollout.seeds import seeded_generator
from ..config import NFTConfig
from ..policies import policy_parameters, use_policy
from ..predictors import CLIP_MODELS, NoisedBatch
from .loss import add_noise, nft_loss, optimality, squared_distance


# Sums over samples that an optimizer step reports, in this order.
STATISTICS = ("loss", "policy_loss", "kl", "deviation", "x0_norm")


def training_sigmas(pipeline, train_timesteps: str) -> torch.Tensor:
    """Noise levels `(steps,)` in (0, 1] that are trained.

    `"warped"`: those of the sampler. `"raw"`: those before its shift, as the code released with Astrolabe has it.
    """
    sigmas = list(pipeline.config.sigmas)
    if train_timesteps == "raw":
        return torch.tensor(sigmas, dtype=torch.float32)
    scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(sigmas=sigmas)
    return scheduler.sigmas[:-1].float()


def noise_batch(
    batch: VideoBatch,
    sigmas: torch.Tensor,
    advantages: torch.Tensor,
    weight: torch.Tensor,
    kl_weight: torch.Tensor,
    use_reference: bool,
    adv_clip_max: float,
) -> NoisedBatch:
    """Noise the window of every sample to one step of the sampler, drawn with the noise from the sample's own
    generator.

    Args:
        sigmas: from [`training_sigmas`].
        advantages: `(B,)`.
        weight, kl_weight, use_reference: as in [`NoisedBatch`].
    """
    window = batch.latents[:, :, batch.window_start :]
    draws = [_draw(sample, sigmas, window.shape[1:]) for sample in batch.samples]
    device = batch.latents.device
    sigma = torch.stack([sigma for sigma, _ in draws]).to(device)
    noise = torch.stack([noise for _, noise in draws]).to(device)
    return NoisedBatch(
        clean=batch.latents,
        noisy=add_noise(window, noise, sigma),
        sigma=sigma,
        timestep=1000 * sigma,
        prompt_embeds=batch.prompt_embeds,
        optimality=optimality(advantages.to(device), adv_clip_max),
        weight=weight.to(device),
        kl_weight=kl_weight.to(device),
        use_reference=use_reference,
        shared_past=batch.shared_past,
    )


def _draw(sample: Sample, sigmas: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    generator = seeded_generator("train", *sample.key)
    sigma = sigmas[torch.randint(len(sigmas), (), generator=generator)]
    return sigma, torch.randn(shape, generator=generator)


def accumulate_gradients(
    accelerator: Accelerator,
    model: torch.nn.Module,
    batch: NoisedBatch,
    config: NFTConfig,
    samples_per_step: int,
    synchronize: bool,
) -> torch.Tensor:
    """Add a batch's part of the gradient of the mean loss to the current policy's parameters.

    Args:
        model: the prepared transformer (wrapped by DDP if there are several processes).
        samples_per_step: samples of an optimizer step on this process.
        synchronize: whether this is the last batch of the step, after which processes average their gradients.

    Returns:
        The sums over samples of [`STATISTICS`], `(5,)`.
    """
    transformer = accelerator.unwrap_model(model)
    clip_model = CLIP_MODELS[config.context]
    frozen = {"old": {}, "reference": {}} if batch.use_reference and config.kl_weight else {"old": {}}
    # One past for all policies, and one cache; or each its own, one after the other, and one cache at a time.
    shared = config.context_policy == "old"
    if not shared:
        for policy in frozen:
            with use_policy(transformer, policy):
                frozen[policy] = clip_model(transformer, batch).predict_window()
    with use_policy(transformer, "old" if shared else "current"):
        current = clip_model(transformer, batch, take_turns=shared)

    statistics = torch.zeros(len(STATISTICS), device=batch.clean.device)
    for frames in current.blocks:
        if shared:
            for policy in frozen:
                with use_policy(transformer, policy):
                    frozen[policy][frames.start] = current.predict(frames)
        old = frozen["old"][frames.start]
        is_last = synchronize and frames == current.blocks[-1]
        # Inside no_sync go both passes: DDP decides in the forward pass what the backward pass does.
        with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
            prediction = current.predict(frames, forward=model)
            policy_loss = nft_loss(
                prediction,
                old,
                batch.clean[:, :, frames],
                batch.optimality,
                config.beta,
                adaptive=config.adv_clip_max if config.loss_weighting == "adaptive" else None,
            )
            kl = torch.zeros_like(policy_loss)
            if "reference" in frozen:
                kl = batch.kl_weight * squared_distance(prediction, frozen["reference"][frames.start])
            loss = batch.weight * policy_loss + config.kl_weight * kl
            # Means over blocks of equal size, weighted by their share of the window, add up to the mean over it.
            share = prediction.shape[2] / batch.noisy.shape[2]
            accelerator.backward(loss.sum() * share / samples_per_step)
        with use_policy(transformer, "old" if shared else "current"):
            current.advance(frames)
        with torch.no_grad():
            deviation = squared_distance(prediction, old)
            norm = prediction.square().flatten(1).mean(1)
            statistics += share * torch.stack([loss, policy_loss, kl, deviation, norm]).sum(1)
    return statistics


class CollapseGuard:
    """Stops a run whose policy falls apart, before the step that would make it worse.

    The norm of the predicted clean videos is compared with that of the first step.
    """

    def __init__(self, factor: float, start_norm: float | None = None):
        self.factor = factor
        self.start_norm = start_norm

    def check(self, loss: float, norm: float, grad_norm: float, step: int):
        if not all(map(math.isfinite, (loss, norm, grad_norm))):
            raise UserError(
                f"step {step}: the loss is {loss}, the gradient's norm {grad_norm}; the policy has collapsed. "
                f"{self._advice}"
            )
        self.start_norm = self.start_norm or norm
        ratio = norm / self.start_norm
        if self.factor and not 1 / self.factor <= ratio <= self.factor:
            raise UserError(
                f"step {step}: predicted videos have {ratio:.2f} times the norm they started with "
                f"(collapse_factor={self.factor:g}); the policy has collapsed. {self._advice}"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"start_norm": self.start_norm}

    def load_state_dict(self, state: dict[str, Any]):
        self.start_norm = state["start_norm"]

    _advice = "Lower learning_rate or add lr_warmup_steps, and resume from a checkpoint before the collapse."


def optimizer_step(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer,
    lr_scheduler,
    batches: Sequence[NoisedBatch],
    config: NFTConfig,
    guard: CollapseGuard,
    step: int,
    before_batch: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Train on the batches of one optimizer step; returns means over all samples of all processes.

    `deviation` and `x0_norm` are root mean squares: of the distance between the predictions of current and old
    policy, and of the current one's predictions. `skipped_steps` is 1 if the loss or the gradient was no finite number
    and `nan_loss` is `skip`: then the step was not taken, in no process.

    Args:
        before_batch: called before each batch; what it raises leaves the policy as it was.
    """
    accelerator.unwrap_model(model).train()
    count = sum(len(batch.clean) for batch in batches)
    totals = 0
    for i, batch in enumerate(batches):
        before_batch()
        totals += accumulate_gradients(accelerator, model, batch, config, count, synchronize=i == len(batches) - 1)
    means = accelerator.reduce(totals / count, reduction="mean").tolist()
    statistics = dict(zip(STATISTICS, means))
    statistics["deviation"] **= 0.5
    statistics["x0_norm"] **= 0.5
    parameters = policy_parameters(accelerator.unwrap_model(model))
    statistics["grad_norm"] = float(full_tensor(accelerator.clip_grad_norm_(parameters, config.max_grad_norm)))
    # Losses and gradients are means over all processes: these agree.
    skip = config.nan_loss == "skip" and not all(map(math.isfinite, statistics.values()))
    if not skip:
        guard.check(statistics["loss"], statistics["x0_norm"], statistics["grad_norm"], step)
        optimizer.step()
    statistics["skipped_steps"] = float(skip)
    statistics["learning_rate"] = lr_scheduler.get_last_lr()[0]
    lr_scheduler.step()
    optimizer.zero_grad()
    return statistics
