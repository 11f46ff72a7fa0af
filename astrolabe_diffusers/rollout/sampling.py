"""Sampling videos from prompts, each from its own random numbers."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch

from ..distributed.sharding import between_passes, passes_are_due
from ..errors import as_user_error
from ..models.latent_frames import num_latents_of
from ..pipelines.block_generation import BlockGenerator, EncodedScene, Sampling, begin_scenes, blend_scenes
from .past import Past, Switch
from .prompt_embeds import StoredPromptEmbeds
from .samples import Sample, Trajectory, VideoBatch
from .scoring import ScoringThread
from .seeds import seeded_generator


class PromptEncoder:
    """Text embeddings of prompts, each computed once, and alone, so that it does not depend on which others are asked
    for; or those that are `stored`. The least recently used of more than `max_prompts` go."""

    def __init__(self, pipeline, max_prompts: int = 512, stored: StoredPromptEmbeds | None = None):
        def encode(prompt: str) -> torch.Tensor:
            if stored is None:
                return pipeline.encode_prompt([prompt])
            return pipeline.encode_prompt(prompt_embeds=stored.read(prompt))

        self._encode = lru_cache(max_prompts)(encode)

    @torch.no_grad()
    def __call__(self, prompts: Iterable[str]) -> torch.Tensor:
        """`(B, L, D)`, on the pipeline's device."""
        return torch.cat([self._encode(prompt) for prompt in prompts])


def encode_scenes(
    prompt_embeds: torch.Tensor, switches: Sequence[Switch], block_frames: int
) -> list[EncodedScene]:
    """The scenes of a video with these texts `(scenes, L, D)`, which come by these switches, the first of them at its
    beginning; without switches of a video with one text."""
    schedule = [EncodedScene(prompt_embeds[0], 0)]
    for embeds, switch in zip(prompt_embeds[1:], switches[1:]):
        scene = EncodedScene(embeds, switch.frame // block_frames, switch.transition, switch.global_sink)
        # A text that has still to change no longer does.
        schedule = [earlier for earlier in schedule if earlier.start < scene.start]
        schedule += blend_scenes(schedule[-1].prompt_embeds, scene, switch.num_blocks)
    return schedule


@dataclass
class Sampler:
    """Samples latents of videos of this `size` (`height`, `width` and `num_frames`, past included) with the active
    policy. With `keep_trajectory` it keeps each block's noisy latents, from the first block on that is not shared."""

    pipeline: object
    size: dict[str, int]
    keep_trajectory: bool = False

    def __call__(
        self, prompt_embeds: torch.Tensor | list[list[EncodedScene]], samples: Sequence[Sample]
    ) -> tuple[torch.Tensor, Trajectory | None]:
        """Latents `(B, C, f, h, w)`, each from its sample's own generator, and how they came about; of prompts
        `(B, L, D)`, or of the scenes of each video."""
        generators = [seeded_generator("sample", *sample.key) for sample in samples]
        arguments, trajectory = {}, None
        if self.keep_trajectory:
            # What the pipeline would draw first.
            noise = self._noise(generators)
            trajectory = Trajectory(noise, self._block_frames)
            arguments = {"latents": noise, "callback_on_step_end": trajectory.on_step_end}
        latents = self.pipeline(
            prompt_embeds=prompt_embeds, generator=generators, output_type="latent", **arguments, **self.size
        ).frames
        return latents, trajectory

    @property
    def _block_frames(self) -> int:
        return self.pipeline.transformer.config.num_frames_per_block

    def _noise(self, generators: list[torch.Generator], num_given: int = 0) -> torch.Tensor:
        device = self.pipeline._execution_device
        return self.pipeline.prepare_latents(
            len(generators), **self.size, device=device, generator=generators, num_given=num_given
        )


@dataclass
class SharedPastSampler(Sampler):
    """Samples the past of a group once, and its videos as continuations of it that share its K/V.

    The past depends on the group alone, so every process that has samples of it makes the same one. It has at least
    one block and the model's sink. What begins with the window, a recache for example, is part of it: it is done once.
    """

    num_past_frames: int = field(kw_only=True)
    _group: tuple | None = field(default=None, init=False)  # whose past is kept

    @torch.no_grad()
    def __call__(
        self, prompt_embeds: torch.Tensor | list[list[EncodedScene]], samples: Sequence[Sample]
    ) -> tuple[torch.Tensor, Trajectory | None]:
        """As [`Sampler`], for samples of one group; the latents have the past in front."""
        scenes = prompt_embeds[0]
        if isinstance(scenes, torch.Tensor):
            scenes = [EncodedScene(scenes, 0)]
        group = samples[0].key[:-1]
        if passes_are_due(here=group != self._group):
            self._group = group
            self._past, self._past_latents = self._sample_past(scenes, group)
        generators = [seeded_generator("sample", *sample.key) for sample in samples]
        noise = self._noise(generators, self.num_past_frames)
        first = self.num_past_frames // self._block_frames
        later = [[scene for scene in scenes if scene.start > first] for _ in samples]
        videos, trajectory = self._past.share_past(len(samples)), None
        if self.keep_trajectory:
            trajectory = Trajectory(noise, self._block_frames)
            videos.sampling = replace(videos.sampling, callback_on_step_end=trajectory.on_step_end)
        past = self._past_latents.expand(len(samples), -1, -1, -1, -1)
        latents = self._denoise(videos, later, noise, generators, first)
        return torch.cat([past, latents], dim=2), trajectory

    def _denoise(
        self,
        videos: BlockGenerator,
        schedule: list[list[EncodedScene]],
        noise: torch.Tensor,
        generators: list[torch.Generator],
        first: int = 0,
    ) -> torch.Tensor:
        blocks = []
        for block, block_noise in enumerate(noise.split(self._block_frames, dim=2), first):
            # Samples of a group have one schedule, so none parts from the others.
            begin_scenes([videos], schedule, block)
            blocks.append(videos.denoise(block_noise, None, generators))
            videos.finish(blocks[-1])
        return torch.cat(blocks, dim=2)

    def _sample_past(self, scenes: list[EncodedScene], group: tuple) -> tuple[BlockGenerator, torch.Tensor]:
        config = self.pipeline.config
        total = num_latents_of(self.pipeline.vae, self.size["num_frames"])
        sampling = Sampling(
            list(config.sigmas), list(config.first_block_sigmas or config.sigmas), max_frames=total, decode=False
        )
        past = self.pipeline.block_generator_class(self.pipeline, sampling, [0])
        past.prompt_embeds = scenes[0].prompt_embeds[None]
        generators, schedule = [seeded_generator("past", *group)], [scenes[1:]]
        noise = self._noise(generators)[:, :, : self.num_past_frames]
        latents = self._denoise(past, schedule, noise, generators)
        begin_scenes([past], schedule, self.num_past_frames // self._block_frames)
        past.remember()
        return past, latents


@dataclass
class Rollout:
    """From prompts to videos that are being scored."""

    pipeline: object
    scoring: ScoringThread
    prompt_embeds: StoredPromptEmbeds | None = None  # where the pipeline has no text encoder

    def __post_init__(self):
        self.encoder = PromptEncoder(self.pipeline, stored=self.prompt_embeds)

    def encode(self, samples: Sequence[Sample]) -> torch.Tensor | list[list[EncodedScene]]:
        """What a [`Sampler`] takes of their prompts."""
        if not any(sample.scenes for sample in samples):
            return self.encoder(sample.prompt.text for sample in samples)
        size = self.pipeline.transformer.config.num_frames_per_block
        switches = [[scene.switch for scene in sample.scenes] for sample in samples]
        return [encode_scenes(self.encoder(s.texts), of_video, size) for s, of_video in zip(samples, switches)]

    def generate(
        self,
        batches: Iterable[Sequence[Sample]],
        size: dict[str, int],
        past: Past = Past(),
        *,
        keep_trajectory: bool = False,
        watched: bool = False,
        keep: Collection[tuple] = (),
        by_block: bool = False,
    ) -> Iterator[VideoBatch]:
        """Sample the batches one after the other with the active policy; each is scored while the next is sampled.

        An error of the rewards is raised one batch later, or by [`gather_scores`]; videos that are not finite are a
        [`UserError`] at once. `size` and `keep_trajectory` are as in [`Sampler`], the others as in
        [`ScoringThread.submit`], `by_block` with the model's blocks.
        """
        if past.shared:
            sampler = SharedPastSampler(self.pipeline, size, keep_trajectory, num_past_frames=past.num_frames)
        else:
            sampler = Sampler(self.pipeline, size, keep_trajectory)
        scores = None
        for samples in batches:
            prompt_embeds, old_prompt_embeds = self.encoder(sample.texts[-1] for sample in samples), None
            if past.switch is not None:
                old_prompt_embeds = self.encoder(sample.texts[-2] for sample in samples)
            with as_user_error("sampling", (FloatingPointError,)):
                latents, trajectory = sampler(self.encode(samples), samples)
            if scores is not None:
                with between_passes():
                    scores.result()  # if rewards are slower than the model, videos must not pile up
            block_frames = self.pipeline.transformer.config.num_frames_per_block if by_block else None
            scores = self.scoring.submit(latents, samples, watched, keep, past, block_frames)
            made = old_prompt_embeds, self.pipeline
            yield VideoBatch(samples, prompt_embeds, latents, scores, past, trajectory, *made)
