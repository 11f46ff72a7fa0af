"""Decoding and scoring videos while the next ones are sampled."""

import itertools
import logging
import math
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from accelerate.utils import gather_object
from diffusers import AutoencoderKLWan

from ..distributed.agreement import raise_together
from ..errors import UserError, one_line, summarize_exception
from ..models.latent_frames import num_frames_of
from ..models.vae_streaming import DECODER_MEMORY, StreamingVAEDecoder, decode_latents
from ..rewards import RewardError, RewardPlacementError, RewardSet
from ..rewards.reward import Closing
from .past import Past
from .reward_thread import RewardThread
from .samples import Sample, VideoBatch


logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class Scores:
    """What the rewards say of one batch.

    `values` has `"reward"`, the weighted sum, each reward by its name, and its parts as `"name/part"`, every one
    `(B,)` float32 on the CPU. `videos` holds those `(F, 3, H, W)` that were to be kept, by sample key.
    """

    values: dict[str, torch.Tensor]
    videos: dict[tuple, torch.Tensor]
    seconds: float


@dataclass(eq=False)
class ScoringThread(Closing):
    """Decodes and scores videos in one background thread while the next ones are sampled, or in turn with sampling if
    rewards are offloaded meanwhile. Its [`close`] closes the rewards too."""

    vae: AutoencoderKLWan  # decodes the latents; nothing else should use it meanwhile
    rewards: RewardSet  # those that are trained on
    watched: RewardSet | None = None  # those that are only reported
    skip_bad: bool = False  # a video without a finite score gets NaN, instead of ending the run
    timeout: float = 600  # seconds that a batch may take

    def __post_init__(self):
        self._reward_sets = [reward_set for reward_set in (self.rewards, self.watched) if reward_set is not None]
        # The current CUDA device belongs to a thread.
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._thread = RewardThread(self.timeout, None if device is None else partial(torch.cuda.set_device, device))

    def submit(
        self,
        latents: torch.Tensor,
        samples: Sequence[Sample],
        watched: bool = False,
        keep: Collection[tuple] = (),
        past: Past = Past(),
        block_frames: int | None = None,
    ) -> Future:
        """[`Scores`] of `latents` `(B, C, f, h, w)` after their `past` as a future; a reward's error becomes a
        [`UserError`]. The `watched` rewards may be asked too; videos of samples with keys in `keep` are kept.

        With `block_frames`, of latents, the blocks after each switch of the prompt are scored by themselves, of whole
        videos: `"after_switch/new/3/name"` is what the reward `name` says of the third with the prompt from the switch
        on, and `"after_switch/old/..."`, of those that look at the prompt, with that before it; NaN if there is none.
        """
        future = self._thread.submit(self._run, latents, samples, watched, keep, past, block_frames)
        if any(reward_set.takes_turns for reward_set in self._reward_sets):
            wait([future])
        return future

    def _run(self, latents, samples, watched, keep, past, block_frames) -> Scores:
        start = time.perf_counter()
        number = max(reward_set.num_context_frames for reward_set in self._reward_sets)
        videos = decode_samples(self.vae, latents, samples, past, number)
        # As many of the frames are before the window.
        before = min(number, num_frames_of(self.vae, past.num_frames))
        values = self._score(videos, samples, watched, past, before)
        if block_frames is not None:
            values |= self._score_blocks(videos, samples, block_frames)
        kept = {sample.key: video[before:].cpu() for sample, video in zip(samples, videos) if sample.key in keep}
        return Scores(values, kept, time.perf_counter() - start)

    def score(self, videos: torch.Tensor, samples: Sequence[Sample], watched: bool = False) -> dict[str, torch.Tensor]:
        """Waits for values as in [`Scores`] of `videos` `(B, F, 3, H, W)` in [0, 1], each with its prompt as it is;
        `samples` are whatever has a `prompt`."""
        plain = [Sample(sample.prompt, 0, (row,)) for row, sample in enumerate(samples)]
        return self._thread.submit(self._score, videos, plain, watched).result()

    @torch.no_grad()
    def _score(
        self, videos: torch.Tensor, samples: Sequence[Sample], watched: bool, past: Past = Past(), before: int = 0
    ) -> dict[str, torch.Tensor]:
        values = self._score_scenes(self.rewards, videos, samples, past, before)
        if watched and self.watched is not None:
            values = values | self._score_scenes(self.watched, videos, samples, past, before) | values
        return values

    def _score_scenes(
        self, rewards: RewardSet, videos: torch.Tensor, samples: Sequence[Sample], past: Past, before: int
    ) -> dict[str, torch.Tensor]:
        """Each scene's frames are scored with its own text: the mean over frames, of which `before` are before the
        window."""
        values, number = {}, videos.shape[1] - before
        for parts, rows in _by(samples, lambda sample: _scene_frames(self.vae, sample, past, number)).items():
            scored = []
            for scene, start, stop in parts:
                batch = [_with_text(samples[row], samples[row].texts[scene]) for row in rows]
                part = self._call(rewards, _rows(videos, rows), slice(before + start, before + stop), batch)
                scored.append((stop - start, part))
            # A scene without a score has no parts of it either.
            for name in (name for name in scored[0][1] if all(name in part for _, part in scored)):
                mean = sum(length * part[name] for length, part in scored) / number
                values.setdefault(name, torch.full((len(samples),), math.nan))[rows] = mean
        return values

    @torch.no_grad()
    def _score_blocks(
        self, videos: torch.Tensor, samples: Sequence[Sample], block_frames: int
    ) -> dict[str, torch.Tensor]:
        """What [`submit`] says of `block_frames`. A video with several switches has the mean over them."""
        scale, blocks, values = self.vae.config.scale_factor_temporal, {}, {}
        for row, sample in enumerate(samples):
            for scene, start, stop in _scene_frames(self.vae, sample, Past(), videos.shape[1])[1:]:
                old, new = sample.texts[scene - 1 : scene + 1]
                for number, first in enumerate(range(start, stop, block_frames * scale), 1):
                    blocks.setdefault((number, first), []).append((row, new, old))
        for (number, first), jobs in blocks.items():
            rows, *texts = zip(*jobs)
            frames = slice(first, first + block_frames * scale)
            rewards = self.rewards.weights, self.rewards.using_prompts
            for which, prompts, names in zip(("new", "old"), texts, rewards):
                batch = [_with_text(samples[row], text) for row, text in zip(rows, prompts)]
                called = self._call(self.rewards, _rows(videos, list(rows)), frames, batch) if names else {}
                for name in names:
                    column = values.setdefault(f"after_switch/{which}/{number}/{name}", [[] for _ in samples])
                    for row, value in zip(rows, called[name].tolist()):
                        column[row].append(value)
        return {
            name: torch.tensor([sum(row) / len(row) if row else math.nan for row in column])
            for name, column in values.items()
        }

    def _call(
        self, rewards: RewardSet, videos: torch.Tensor, frames: slice, samples: Sequence[Sample]
    ) -> dict[str, torch.Tensor]:
        """Scores of some frames of videos, after those before them."""
        prompts = [sample.prompt.text for sample in samples]
        metadata = [sample.prompt.metadata or {} for sample in samples]
        try:
            output = rewards(videos[:, frames], prompts, metadata, videos[:, : frames.start])
        except (RewardError, RewardPlacementError) as error:
            if not self.skip_bad or isinstance(error, RewardPlacementError):
                raise UserError(one_line(error)) from error
            if len(samples) > 1:
                pairs = zip(videos, samples)
                parts = [self._call(rewards, video[None], frames, [sample]) for video, sample in pairs]
                return stack_scores(parts)
            logger.warning("skipped: %s", one_line(error))
            return {name: torch.tensor([math.nan]) for name in ("reward", *rewards.weights)}
        except Exception as error:
            raise UserError(f"a reward failed on {prompts[0]!r}: {summarize_exception(error)}") from error
        return {"reward": output.total, **output.scores, **output.info}

    def wait(self):
        """For what was submitted, whatever comes of it."""
        wait([self._thread.submit(lambda: None)], self.timeout)

    def close(self):
        # The rewards first, for which a call may be waiting.
        for reward_set in self._reward_sets:
            reward_set.close()
        self._thread.close()


def _by(items: Sequence[T], key: Callable[[T], Hashable]) -> dict[Hashable, list[int]]:
    """The indices of items of which the key is the same."""
    rows = {}
    for row, item in enumerate(items):
        rows.setdefault(key(item), []).append(row)
    return rows


def _rows(videos: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Some of the videos; all of them are no copy."""
    return videos if rows == list(range(len(videos))) else videos[rows]


def _with_text(sample: Sample, text: str) -> Sample:
    return replace(sample, prompt=replace(sample.prompt, text=text))


def _scene_frames(
    vae: AutoencoderKLWan, sample: Sample, past: Past, num_frames: int
) -> tuple[tuple[int, int, int], ...]:
    """The scenes of a sample in a window of `num_frames` frames after the `past`: of each its index, its first frame
    there, and the one after its last."""
    if not sample.scenes:
        return ((0, 0, num_frames),)
    first = num_frames_of(vae, past.num_frames)
    starts = [max(num_frames_of(vae, scene.switch.frame) - first, 0) for scene in sample.scenes]
    stops = [*starts[1:], num_frames]
    return tuple((i, start, stop) for i, (start, stop) in enumerate(zip(starts, stops)) if start < stop)


def decode_samples(
    vae: AutoencoderKLWan,
    latents: torch.Tensor,
    samples: Sequence[Sample],
    past: Past = Past(),
    num_context_frames: int = 0,
) -> torch.Tensor:
    """[`decode_videos`], each with the cuts of its own scenes."""
    videos: list[torch.Tensor | None] = [None] * len(samples)
    for cuts, rows in _by(samples, lambda sample: sample.cuts).items():
        decoded = decode_videos(vae, _rows(latents, rows), past, cuts, num_context_frames)
        if len(rows) == len(samples):
            return decoded
        for row, video in zip(rows, decoded):
            videos[row] = video
    return torch.stack(videos)


@torch.no_grad()
def decode_videos(
    vae: AutoencoderKLWan,
    latents: torch.Tensor,
    past: Past = Past(),
    cuts: Sequence[int] = (),
    num_context_frames: int = 0,
) -> torch.Tensor:
    """Videos `(B, F, 3, H, W)` in [0, 1], float32, of `latents` `(B, C, f, h, w)` after their past, and in front of
    them the last `num_context_frames` of that, or all that there are.

    The past warms the decoder's memory up, as much of it as that can hold, so that the window's first frames are
    those of the whole video. One that is shared is decoded once for all. From the latent frames `cuts` on the video
    is another one, whose first frame is held as long as four, as the pipeline does.
    """
    scale, takes = vae.config.scale_factor_temporal, []
    first = max(past.num_frames - -(-num_context_frames // scale), 0)  # the first latent frame whose frames are kept
    for start, stop in itertools.pairwise((0, *cuts, latents.shape[2])):
        if stop > first:
            begin, window = max(first - start, 0), min(max(past.num_frames, start), stop) - start
            frames = _decode_take(vae, latents[:, :, start:stop], begin, window, past)
            if start and begin == 0:
                frames = torch.cat([frames[:, :1].expand(-1, scale - 1, -1, -1, -1), frames], dim=1)
            takes.append(frames)
    videos = torch.cat(takes, dim=1)
    length = num_frames_of(vae, latents.shape[2]) - num_frames_of(vae, past.num_frames)
    return videos[:, max(videos.shape[1] - length - num_context_frames, 0) :]


def _decode_take(
    vae: AutoencoderKLWan, latents: torch.Tensor, begin: int, window: int, past: Past
) -> torch.Tensor:
    """Of the latent frames from `begin` on; those before `window` are part of the past."""
    if window == 0:
        frames = decode_latents(vae, latents)
    else:
        decoder, pieces = StreamingVAEDecoder(vae), []
        for frame in range(max(begin - DECODER_MEMORY, 0), begin):
            decoder.decode(past.rows(latents[:, :, frame : frame + 1]))
        if begin < window:
            piece = decoder.decode(past.rows(latents[:, :, begin:window]))
            pieces.append(piece.expand(len(latents), -1, -1, -1, -1))
        if past.shared:
            decoder = decoder.select([0] * len(latents))
        if window < latents.shape[2]:
            pieces.append(decoder.decode(latents[:, :, window:]))
        frames = torch.cat(pieces, dim=2)
    return (frames.float() / 2).add_(0.5).clamp_(0, 1).transpose(1, 2)


def stack_scores(parts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The values of several batches as one; a name that a batch lacks is NaN there."""
    names = dict.fromkeys(name for part in parts for name in part)
    missing = [torch.full_like(part["reward"], math.nan) for part in parts]
    return {name: torch.cat([part.get(name, nan) for part, nan in zip(parts, missing)]) for name in names}


def gather_scores(batches: Sequence[VideoBatch], samples: Sequence[Sample]) -> tuple[dict[str, torch.Tensor], float]:
    """Waits for the scores of this process's `batches`, exchanges them with the others, and returns by name those
    `(N,)` of all `samples`, and the seconds that the slowest process spent on scoring.

    If a reward failed anywhere, its error is raised in every process: none is left waiting.
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
