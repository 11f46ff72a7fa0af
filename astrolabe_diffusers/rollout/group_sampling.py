"""Groups of videos that part from one past (Astrolabe 3.2, clip-level groups)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..pipelines.block_generation import BlockGenerator, Sampling
from .samples import Sample
from .seeds import seeded_generator


class GroupSampler:
    """Samples the past of a group once, and its videos as continuations of it that share its K/V.

    The past depends on the group alone, so every process that has samples of it makes the same one.

    Args:
        pipeline ([`CausalWanPipeline`]): with the policy active that samples.
        size: `height`, `width` and `num_frames` of the whole videos.
        window_start: latent frames of the past, at least one block and the model's sink.
    """

    def __init__(self, pipeline, size: dict[str, int], window_start: int):
        self.pipeline = pipeline
        self.size = size
        self.window_start = window_start
        self._group: tuple | None = None

    @torch.no_grad()
    def __call__(self, prompt_embeds: torch.Tensor, samples: Sequence[Sample]) -> torch.Tensor:
        """Latents `(B, C, f, h, w)` of samples of one group, past included.

        Args:
            prompt_embeds: `(B, L, D)`, the same for all.
        """
        group = samples[0].key[:-1]
        if group != self._group:
            self._group = group
            self._past, self._past_latents = self._sample_past(prompt_embeds[:1], group)
        generators = [seeded_generator("sample", *sample.key) for sample in samples]
        noise = self._noise(len(samples), generators, self.window_start)
        videos = self._past.fork(len(samples), prompt_embeds)
        blocks = [self._past_latents.expand(len(samples), -1, -1, -1, -1)]
        for block_noise in noise.split(self._block_frames, dim=2):
            blocks.append(videos.denoise(block_noise, None, generators))
            videos.finish(blocks[-1])
        return torch.cat(blocks, dim=2)

    def _sample_past(self, prompt_embeds: torch.Tensor, group: tuple) -> tuple[BlockGenerator, torch.Tensor]:
        config, total = self.pipeline.config, self._num_latents
        sampling = Sampling(
            list(config.sigmas), list(config.first_block_sigmas or config.sigmas), max_frames=total, decode=False
        )
        past = self.pipeline.block_generator_class(self.pipeline, sampling, [0])
        past.prompt_embeds = prompt_embeds
        generator = seeded_generator("past", *group)
        blocks = []
        noise = self._noise(1, [generator], 0)[:, :, : self.window_start]
        for block_noise in noise.split(self._block_frames, dim=2):
            blocks.append(past.denoise(block_noise, None, [generator]))
            past.finish(blocks[-1])
        past.remember()
        return past, torch.cat(blocks, dim=2)

    @property
    def _block_frames(self) -> int:
        return self.pipeline.transformer.config.num_frames_per_block

    @property
    def _num_latents(self) -> int:
        return (self.size["num_frames"] - 1) // self.pipeline.vae.config.scale_factor_temporal + 1

    def _noise(self, batch_size: int, generators: list[torch.Generator], num_given: int) -> torch.Tensor:
        return self.pipeline.prepare_latents(
            batch_size, **self.size, device=self.pipeline._execution_device, generator=generators, num_given=num_given
        )
