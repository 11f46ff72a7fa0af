"""A policy gradient on the sampler's steps, as small as can be: an algorithm with advantages of its own that asks for
the trajectory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from astrolabe_diffusers.models.kv_cache import CausalWanKVCache
from astrolabe_diffusers.training import OnlineConfig, OnlineTrainer
from astrolabe_diffusers.training.advantages import Advantages


@dataclass
class StepBatch:
    clean: torch.Tensor
    prompt_embeds: torch.Tensor
    latents: list[list[torch.Tensor]]
    timesteps: list[list[float]]
    advantages: torch.Tensor


class StepPolicyGradient(OnlineTrainer):
    config_class = OnlineConfig
    keep_trajectory = True

    def advantages(self, scores, samples):
        """Of every sample against the mean of all, whatever its group."""
        reward = scores["reward"]
        one_group = torch.zeros(len(reward), dtype=torch.long)
        return Advantages(reward - reward.mean(), ~reward.isnan(), reward.std(correction=0)[None], one_group)

    def accumulate_gradients(self, batch, values, samples_per_step, synchronize):
        return self.accumulate(step_batch(batch, values["advantages"]), samples_per_step)

    def accumulate(self, batch, samples_per_step):
        total = 0
        for loss in step_losses(self.transformer, batch, self.model):
            self.accelerator.backward((batch.advantages * loss).sum() / samples_per_step)
            total = total + (batch.advantages * loss.detach()).sum()
        return {"loss": total}


def step_batch(batch, advantages):
    trajectory = batch.trajectory
    return StepBatch(batch.latents, batch.prompt_embeds, trajectory.latents, trajectory.timesteps, advantages)


def step_losses(transformer, batch, forward):
    """Minus the log-likelihood `(B,)` of every step that draws noise, up to a constant, block after block.

    A step goes from `x` at noise level `s` to `(1 - s') x_0 + s' eps` with the predicted `x_0 = x - s v`.
    """
    n = transformer.config.num_frames_per_block
    cache = CausalWanKVCache(transformer.config.num_layers, max_frames=batch.clean.shape[2])

    def run(latents, timestep, mode, start, model):
        arguments = {"kv_cache": cache, "kv_cache_mode": mode, "frame_offset": start, "return_dict": False}
        return model(latents, torch.full((len(latents),), float(timestep)), batch.prompt_embeds, **arguments)[0]

    for block, (latents, timesteps) in enumerate(zip(batch.latents, batch.timesteps)):
        for i, (timestep, following) in enumerate(zip(timesteps, timesteps[1:])):
            sigma, next_sigma = timestep / 1000, following / 1000
            clean = latents[i] - sigma * run(latents[i], timestep, "read", block * n, forward)
            error = (latents[i + 1] - (1 - next_sigma) * clean) / next_sigma
            yield error.square().flatten(1).mean(1) / 2
        if block + 1 < len(batch.latents):
            with torch.no_grad():
                run(latents[-1], 0, "write", block * n, transformer)
