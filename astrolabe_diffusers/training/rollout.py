"""Sampling videos, and decoding and scoring them while the next ones are sampled."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

import torch
from accelerate.utils import gather_object
from diffusers import AutoencoderKLWan

from ..models.vae_streaming import DECODER_MEMORY, StreamingVAEDecoder, decode_latents
from ..rewards import RewardError, RewardPlaceError, RewardSet
from .agreement import raise_together
from .errors import UserError, as_user_error, one_line, summarize_exception
from .group_sampling import GroupSampler
from .prompts import Sample
from .reward_thread import RewardThread
from .seeds import seeded_generator


logger = logging.getLogger(__name__)


@dataclass
class Scores:
    """What the rewards say of one batch.

    `values` has `"reward"`, the weighted sum, each reward by its name, and its parts as `"name/part"`, every one
    `(B,)` float32 on the CPU. `videos` holds those `(F, 3, H, W)` that were to be kept, by sample key.
    """

    values: dict[str, torch.Tensor]
    videos: dict[tuple, torch.Tensor]
    seconds: float


@dataclass
class VideoBatch:
    """Sampled videos: `latents` `(B, C, f, h, w)` float32, `prompt_embeds` `(B, L, D)`, a future of [`Scores`].

    Of the latents those from `window_start` on are scored and trained; with `shared_past` the videos have those before
    in common.
    """

    samples: Sequence[Sample]
    prompt_embeds: torch.Tensor
    latents: torch.Tensor
    scores: Future = field(repr=False)
    window_start: int = 0
    shared_past: bool = False


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


class RewardWorker:
    """Decodes and scores videos in one background thread; in turn with sampling if rewards are offloaded meanwhile.

    Args:
        vae ([`AutoencoderKLWan`]): decodes the latents; nothing else should use it meanwhile.
        rewards ([`RewardSet`]): the rewards that are trained on.
        watched ([`RewardSet`], *optional*): rewards that are only reported.
        skip_bad (`bool`): a video without a finite score gets NaN, instead of ending the run.
        timeout (`float`): seconds that a batch may take.
    """

    def __init__(
        self,
        vae: AutoencoderKLWan,
        rewards: RewardSet,
        watched: RewardSet | None = None,
        skip_bad: bool = False,
        timeout: float = 600,
    ):
        self.vae = vae
        self.rewards = rewards
        self.watched = watched
        self.skip_bad = skip_bad
        self._reward_sets = [reward_set for reward_set in (rewards, watched) if reward_set is not None]
        # The current CUDA device belongs to a thread.
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        initializer = None if device is None else (lambda: torch.cuda.set_device(device))
        self._thread = RewardThread(timeout, initializer)

    def submit(
        self,
        latents: torch.Tensor,
        samples: Sequence[Sample],
        watched: bool = False,
        keep: Collection[tuple] = (),
        window_start: int = 0,
        shared_past: bool = False,
    ) -> Future:
        """Scores of `latents` `(B, C, f, h, w)` as a future; a reward's error becomes a [`UserError`].

        Args:
            watched: ask the watched rewards too.
            keep: keys of the samples whose videos are wanted back.
            window_start, shared_past: as in [`decode_videos`].
        """
        future = self._thread.submit(self._run, latents, samples, watched, keep, window_start, shared_past)
        if any(reward_set.takes_turns for reward_set in self._reward_sets):
            wait([future])
        return future

    def _run(self, latents, samples, watched, keep, window_start, shared_past) -> Scores:
        start = time.perf_counter()
        videos = decode_videos(self.vae, latents, window_start, shared_past)
        values = self._score(videos, samples, watched)
        kept = {sample.key: video.cpu() for sample, video in zip(samples, videos) if sample.key in keep}
        return Scores(values, kept, time.perf_counter() - start)

    def score(self, videos: torch.Tensor, samples: Sequence[Sample], watched: bool = False) -> dict[str, torch.Tensor]:
        """Waits for values as in [`Scores`] of `videos` `(B, F, 3, H, W)` in [0, 1]."""
        return self._thread.submit(self._score, videos, samples, watched).result()

    @torch.no_grad()
    def _score(self, videos: torch.Tensor, samples: Sequence[Sample], watched: bool) -> dict[str, torch.Tensor]:
        values = self._call(self.rewards, videos, samples)
        if watched and self.watched is not None:
            values |= {n: v for n, v in self._call(self.watched, videos, samples).items() if n not in values}
        return values

    def _call(self, rewards: RewardSet, videos: torch.Tensor, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        prompts = [sample.prompt.text for sample in samples]
        metadata = [sample.prompt.metadata or {} for sample in samples]
        try:
            output = rewards(videos, prompts, metadata)
        except RewardError as error:
            if not self.skip_bad:
                raise UserError(one_line(error)) from error
            if len(samples) > 1:
                parts = [self._call(rewards, video[None], [sample]) for video, sample in zip(videos, samples)]
                return stack_scores(parts)
            logger.warning("skipped: %s", one_line(error))
            return {name: torch.tensor([math.nan]) for name in ("reward", *rewards.weights)}
        except RewardPlaceError as error:
            raise UserError(one_line(error)) from error
        except Exception as error:
            raise UserError(f"a reward failed on {prompts[0]!r}: {summarize_exception(error)}") from error
        return {"reward": output.total, **output.scores, **output.info}

    def shutdown(self):
        self._thread.shutdown()
        for reward_set in self._reward_sets:
            reward_set.close()


def sample_latents(
    pipeline, prompt_embeds: torch.Tensor, samples: Sequence[Sample], size: dict[str, int]
) -> torch.Tensor:
    """Latents `(B, C, f, h, w)`, each from its sample's own generator.

    Args:
        size: `height`, `width` and `num_frames`.
    """
    generators = [seeded_generator("sample", *sample.key) for sample in samples]
    return pipeline(prompt_embeds=prompt_embeds, generator=generators, output_type="latent", **size).frames


@torch.no_grad()
def decode_videos(
    vae: AutoencoderKLWan, latents: torch.Tensor, window_start: int = 0, shared_past: bool = False
) -> torch.Tensor:
    """Videos `(B, F, 3, H, W)` in [0, 1], float32, of `latents` `(B, C, f, h, w)` from latent frame `window_start` on.

    Frames before it warm the decoder's memory up, as many as it can remember, so that the window's first frames are
    those of the whole video. With `shared_past` they are decoded once for all.
    """
    if window_start == 0:
        frames = decode_latents(vae, latents)
    else:
        decoder = StreamingVAEDecoder(vae)
        rows = 1 if shared_past else None
        for frame in range(max(window_start - DECODER_MEMORY, 0), window_start):
            decoder.decode(latents[:rows, :, frame : frame + 1])
        if shared_past:
            decoder = decoder.select([0] * len(latents))
        frames = decoder.decode(latents[:, :, window_start:])
    return (frames.float() / 2 + 0.5).clamp(0, 1).transpose(1, 2)


def generate(
    pipeline,
    encoder: PromptEncoder,
    worker: RewardWorker,
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
        watched, keep: as in [`RewardWorker.submit`].
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


def stack_scores(parts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The values of several batches as one; a name that a batch lacks is NaN there."""
    names = dict.fromkeys(name for part in parts for name in part)
    missing = [torch.full_like(part["reward"], math.nan) for part in parts]
    return {name: torch.cat([part.get(name, nan) for part, nan in zip(parts, missing)]) for name in names}


def gather_scores(batches: Sequence[VideoBatch], samples: Sequence[Sample]) -> tuple[dict[str, torch.Tensor], float]:
    """Wait for the scores of this process and exchange them with the others.

    Args:
        batches: what this process sampled.
        samples: all samples, in the order in which their scores are wanted.

    Returns:
        For each name the scores `(N,)` of all samples, and the seconds that the slowest process spent on scoring. If
        a reward failed anywhere, its error is raised in every process: none is left waiting.
    """
    with raise_together():
        scores = [batch.scores.result() for batch in batches]
    keys = [sample.key for batch in batches for sample in batch.samples]
    values = stack_scores([part.values for part in scores])
    gathered = gather_object([(keys, values, sum(part.seconds for part in scores))])
    row = {key: i for i, key in enumerate(key for keys, *_ in gathered for key in keys)}
    order = torch.tensor([row[sample.key] for sample in samples])
    columns = stack_scores([values for _, values, _ in gathered if values])
    return {name: column[order] for name, column in columns.items()}, max(seconds for *_, seconds in gathered)
