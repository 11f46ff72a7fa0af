"""Sampling videos, and decoding and scoring them while the next ones are sampled."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

import torch

from ..errors import as_user_error
from .group_sampling import GroupSampler
from .samples import Sample, VideoBatch
from .scoring import ScoringThread
from .seeds import seeded_generator


class PromptEncoder:
    """Text embeddings of prompts, each computed once. The least recently used of more than `max_prompts` go.

    Prompts are encoded one at a time, so that an embedding does not depend on which others are asked for.
    """

    def __init__(self, pipeline, max_prompts: int = 512):
        self.pipeline = pipeline
        self.max_prompts = max_prompts
        self._embeds: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, prompts: Iterable[str]) -> torch.Tensor:
        """`(B, L, D)`, on the pipeline's device."""
        return torch.cat([self._encode(prompt) for prompt in prompts])

    def _encode(self, prompt: str) -> torch.Tensor:
        if prompt not in self._embeds:
            if len(self._embeds) >= self.max_prompts:
                del self._embeds[next(iter(self._embeds))]
            self._embeds[prompt] = self.pipeline.encode_prompt([prompt])
        else:
            self._embeds[prompt] = self._embeds.pop(prompt)
        return self._embeds[prompt]


def sample_latents(
    pipeline, prompt_embeds: torch.Tensor, samples: Sequence[Sample], size: dict[str, int]
) -> torch.Tensor:
    """Latents `(B, C, f, h, w)`, each from its sample's own generator.

    Args:
        size: `height`, `width` and `num_frames`.
    """
    generators = [seeded_generator("sample", *sample.key) for sample in samples]
    return pipeline(prompt_embeds=prompt_embeds, generator=generators, output_type="latent", **size).frames


def generate(
    pipeline,
    encoder: PromptEncoder,
    worker: ScoringThread,
    batches: Iterable[Sequence[Sample]],
    size: dict[str, int],
    watched: bool = False,
    keep: Collection[tuple] = (),
    window_start: int = 0,
    shared_past: bool = False,
) -> Iterator[VideoBatch]:
    """Sample the batches one after the other with the active policy; each is scored while the next is sampled.

    An error of the rewards is raised one batch later, or by [`gather_scores`]; videos that are not finite are a
    [`UserError`] at once.

    Args:
        watched, keep: as in [`ScoringThread.submit`].
        window_start: latent frame from which on the videos are scored.
        shared_past: a batch is of one group, whose videos have the frames before `window_start` in common.
    """
    scores = None
    shared_past = shared_past and window_start > 0
    group_sampler = GroupSampler(pipeline, size, window_start) if shared_past else None
    for samples in batches:
        prompt_embeds = encoder(sample.prompt.text for sample in samples)
        with as_user_error("sampling", (FloatingPointError,)):
            if shared_past:
                latents = group_sampler(prompt_embeds, samples)
            else:
                latents = sample_latents(pipeline, prompt_embeds, samples, size)
        if scores is not None:
            scores.result()  # if rewards are slower than the model, videos must not pile up
        scores = worker.submit(latents, samples, watched, keep, window_start, shared_past)
        yield VideoBatch(samples, prompt_embeds, latents, scores, window_start, shared_past)
