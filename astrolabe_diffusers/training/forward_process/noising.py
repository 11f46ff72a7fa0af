"""The forward process: sampled videos with noise, and clean ones predicted from them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...errors import UserError
from ...rollout.past import Past
from ...rollout.samples import VideoBatch
from ...rollout.seeds import seeded_generator


@dataclass
class NoisedBatch:
    """Sampled videos, and the window of them that is trained, with noise. Latents are float32."""

    clean: torch.Tensor  # `(B, C, F, h, w)`
    noisy: torch.Tensor  # `(B, C, W, h, w)`, the last `W` frames with noise
    sigma: torch.Tensor  # `(B,)`, the noise level in (0, 1]
    timestep: torch.Tensor  # `(B,)`, 1000 times that
    prompt_embeds: torch.Tensor  # `(B, L, D)`
    past: Past = Past()  # what is before the window
    old_prompt_embeds: torch.Tensor | None = None  # with a switch of the prompt in it, those before that
    pipeline: object | None = None  # that made the videos


def training_sigmas(pipeline, train_timesteps: str, train_steps: Sequence[int] = ()) -> torch.Tensor:
    """Noise levels `(steps,)` in (0, 1] that are trained, of the sampler's steps `train_steps` or of all. One that
    begins without noise has nothing to predict and is none of them.

    `"warped"`: those of the sampler. `"raw"`: those before its shift, as the code released with Astrolabe has it.
    """
    sigmas = torch.tensor(list(pipeline.config.sigmas), dtype=torch.float32)
    if train_timesteps == "warped":
        scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config)
        scheduler.set_timesteps(sigmas=sigmas.tolist())
        sigmas = scheduler.sigmas[:-1].float()
    sigmas = sigmas[sigmas > 0]
    if unknown := set(train_steps) - set(range(len(sigmas))):
        raise UserError(f"train_steps={min(unknown)}: the sampler's steps with noise are 0 to {len(sigmas) - 1}.")
    return sigmas[list(train_steps)] if train_steps else sigmas


def noise_batch(batch: VideoBatch, sigmas: torch.Tensor) -> NoisedBatch:
    """Noises the window of every sample to one of `sigmas`, from [`training_sigmas`], drawn with the noise from the
    sample's own generator."""
    window = batch.latents[:, :, batch.past.num_frames :]
    draws = []
    for sample in batch.samples:
        generator = seeded_generator("train", *sample.key)
        sigma = sigmas[torch.randint(len(sigmas), (), generator=generator)]
        draws.append((sigma, torch.randn(window.shape[1:], generator=generator)))
    sigma, noise = (torch.stack(drawn).to(window.device) for drawn in zip(*draws))
    noisy = add_noise(window, noise, sigma)
    made = batch.old_prompt_embeds, batch.pipeline
    return NoisedBatch(batch.latents, noisy, sigma, 1000 * sigma, batch.prompt_embeds, batch.past, *made)


def add_noise(clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """`x_t = (1 - sigma) x_0 + sigma eps`; `sigma` `(B,)` in [0, 1], the others `(B, ...)`."""
    sigma = per_sample(sigma, clean)
    return (1 - sigma) * clean + sigma * noise


def predicted_clean(noisy: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """`x_0 = x_t - sigma v` with the predicted flow `v = eps - x_0`; `sigma` `(B,)`, the others `(B, ...)`."""
    return noisy - per_sample(sigma, noisy) * velocity


def squared_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of each sample, `(B, ...)` to `(B,)`. With the reference policy's prediction as `b` this
    is the KL term of the loss: both predict with the same fixed variance."""
    return (a - b).square().flatten(1).mean(1)


def per_sample(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`(B,)` as what multiplies `like` `(B, ...)`."""
    return values.view(-1, *[1] * (like.ndim - 1))
