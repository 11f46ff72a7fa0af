"""One block after the other: sampler, cache and decoder of videos that are generated together."""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.utils.torch_utils import randn_tensor

from ..models.contract import packs_blocks, store_mode
from ..models.kv_cache_shared_past import share_past
from ..models.latent_frames import num_frames_of
from ..models.vae_streaming import encode_video
from .scene_prompt import TRANSITIONS
from .stream import Call


# A seed means another video in another layout.
NOISE_LAYOUT = "BFCHW"


def draw_noise(
    shape: tuple[int, int, int, int, int],
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device,
    dtype: torch.dtype,
    non_blocking: bool = False,
) -> torch.Tensor:
    """
    Standard normal noise of `shape` `(B, C, F, h, w)`, float32, as the published samplers draw it, so that their seeds
    give their videos.

    Self-Forcing, Causal-Forcing, LongLive and Krea's server have the frames before the channels in memory. Rounded to
    `dtype`, the model's: on CUDA a bfloat16 draw, which theirs are, is the rounded float32 draw.

    `non_blocking` does not wait, on its way from generators on the CPU, for what the GPU has still to do. That takes
    page-locked memory, which the process keeps.
    """
    batch_size, channels, num_frames, height, width = shape
    layout = (batch_size, num_frames, channels, height, width)
    generators = generator if isinstance(generator, list) else [generator]
    if non_blocking and device.type == "cuda" and generators[0] is not None and generators[0].device.type == "cpu":
        # Drawn where it is sent from: `pin_memory`, which copies, took 15 ms a draw on a busy machine.
        noise = torch.empty(layout, dtype=torch.float32, pin_memory=True)
        for part, own in zip(noise.chunk(len(generators)), generators, strict=True):
            part.normal_(generator=own)
        noise = noise.to(device, non_blocking=True)
    else:
        noise = randn_tensor(layout, generator=generator, device=device, dtype=torch.float32)
    return noise.to(dtype).float().transpose(1, 2).contiguous()


@dataclass
class Sampling:
    """What is the same for all blocks of a call."""

    sigmas: list[float]  # before the shift
    first_block_sigmas: list[float]  # of the first block that is generated, and of the first after a cut
    max_frames: int | None  # latent frames of the longest video; `None` if it has no end
    decode: bool  # whether pixels are wanted
    attention_kwargs: dict[str, Any] | None = None
    callback_on_step_end: Callable | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)
    call: Call = field(default_factory=Call)


@dataclass
class EncodedScene:
    """From block `start` on: text embeddings `(L, dim)`, and how the video comes to them."""

    prompt_embeds: torch.Tensor
    start: int
    transition: str = "roll"
    global_sink: bool = True  # with "recache"


class ReencodedContext:
    """
    The last `num_frames` latent frames of a video, as the beginning of one, encoded anew for every block (Krea).

    Wan's first latent frame stands for a single frame, every other for four. So the frame just before the latents that
    are kept is encoded by itself and stands before them; or, to begin with, the video's own first latent frame.
    """

    def __init__(self, vae: AutoencoderKLWan, num_frames: int):
        self.vae = vae
        self.num_frames = num_frames
        self._first: torch.Tensor | None = None
        self._latents: torch.Tensor | None = None
        self._frames: torch.Tensor | None = None

    def select(self, videos: list[int]) -> "ReencodedContext":
        """A context of its own for some videos of the batch."""
        other = copy.copy(self)
        if self._latents is not None:
            for name in ("_first", "_latents", "_frames"):
                setattr(other, name, getattr(self, name)[videos])
        return other

    def append(self, latents: torch.Tensor, frames: torch.Tensor) -> None:
        """Add a block: latents `(B, C, n, h, w)` and what they decode to, `(B, 3, F, H, W)` in [-1, 1]."""
        if self._latents is None:
            self._first = latents[:, :, :1]
        else:
            latents = torch.cat([self._latents, latents], dim=2)
            frames = torch.cat([self._frames, frames], dim=2)
        self._latents = latents[:, :, -self.num_frames :]
        self._frames = frames[:, :, -num_frames_of(self.vae, self.num_frames) :]

    def __call__(self, keep_first: bool) -> torch.Tensor:
        """The context, `(B, C, f, h, w)`, shorter at the video's beginning. With `keep_first` it begins with the
        video's first latent frame, whatever was left out since."""
        first = self._first if keep_first else encode_video(self.vae, self._frames[:, :, :1])
        return torch.cat([first, self._latents[:, :, 1:]], dim=2)


def check_finite(block: torch.Tensor, what: str):
    if not block.isfinite().all():
        raise FloatingPointError(
            f"the {what} of a block have NaN or infinite values: so have weights, a LoRA or the prompt embeddings; "
            "or they pass the dtype's range (float16 where the model needs bfloat16)."
        )


class BlockGenerator:
    """Videos that go on together, and what they remember of their past. Of `pipe` nothing changes but this."""

    def __init__(self, pipe, sampling: Sampling, videos: list[int]):
        self.pipe = pipe
        self.sampling = sampling
        self.videos = videos  # indices in the batch of the call
        # Asked for once: diffusers goes through all modules for the answer.
        self.transformer, self.dtype = pipe.denoiser, pipe.transformer.dtype
        self.packs_blocks, self.store_mode = packs_blocks(self.transformer), store_mode(self.transformer)
        self.prompt_embeds: torch.Tensor | None = None  # (videos, L, dim) of the current scenes
        self.scheduler = copy.deepcopy(pipe.scheduler)
        self.restart()

    def restart(self):
        """A hard cut: forget the past."""
        pipe, num_context = self.pipe, self.pipe.config.num_context_frames
        config = pipe.transformer.config
        max_frames = num_context + config.num_frames_per_block if num_context else self.sampling.max_frames
        self.kv_cache = pipe.transformer.new_kv_cache(max_frames, pipe.config.past_weight)
        self.decoder = pipe.new_decoder()
        self.context = ReencodedContext(pipe.vae, num_context) if num_context else None
        # The last block, which enters the cache only when another follows, and the prompt it was made with.
        self.last: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor] | None = None
        self.history: torch.Tensor | None = None  # clean latents of the window, for `recache`
        self.num_given = self.num_generated = 0  # blocks

    def select(self, rows: list[int]) -> "BlockGenerator":
        """A generator of its own for some of these videos, by their places here."""
        other = copy.copy(self)
        other.videos = [self.videos[row] for row in rows]
        other.prompt_embeds = self.prompt_embeds[rows]
        other.kv_cache = self.kv_cache.select(rows)
        other.decoder = self.decoder.select(rows)
        other.context = self.context and self.context.select(rows)
        other.last = self.last and tuple(None if tensor is None else tensor[rows] for tensor in self.last)
        other.history = None if self.history is None else self.history[rows]
        return other

    def share_past(self, num_videos: int) -> "BlockGenerator":
        """A generator of `num_videos` continuations of this one's single video, which share its cache. Only latents:
        nothing is decoded, and `remember` has to have been called."""
        other = copy.copy(self)
        other.videos = list(range(num_videos))
        other.prompt_embeds = self.prompt_embeds.repeat(num_videos, 1, 1)
        other.kv_cache = share_past(self.kv_cache, num_videos, self.sampling.max_frames)
        other.history = self.history.expand(num_videos, -1, -1, -1, -1)
        return other

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, prompt_embeds: torch.Tensor, mode: str):
        return self.transformer(
            latents.to(self.dtype),
            timestep.expand(latents.shape[0]),
            prompt_embeds,
            kv_cache=self.kv_cache,
            kv_cache_mode=mode,
            frame_offset=self.kv_cache.num_frames,
            attention_kwargs=self.sampling.attention_kwargs,
            return_dict=False,
        )[0]

    def remember(self):
        """Bring the cache up to the last block. A context that is encoded anew enters it block by block."""
        if self.last is None:
            return
        latents, frames, prompt_embeds = self.last
        self.last = None
        if self.context:
            self.context.append(latents, self.decoder.decode(latents) if frames is None else frames)
            self.kv_cache.clear()
            latents = self.context(keep_first=max(self.num_given, self.num_generated) <= 1)
        for block in latents.split(self.pipe.transformer.config.num_frames_per_block, dim=2):
            self.predict(block, block.new_zeros(1), prompt_embeds, self.store_mode)

    def read(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The flow of noisy latents, which see the last block. If that has still to enter the cache, it does so in the
        same pass where this is possible: fewer and larger kernels."""
        if self.last is None or not self._can_pair(latents):
            self.remember()
            return self.predict(latents, timestep, self.prompt_embeds, "read")
        clean, self.last = self.last[0], None
        return self.predict(torch.cat([clean, latents], dim=2), timestep, self.prompt_embeds, "store+read")

    def _can_pair(self, latents: torch.Tensor) -> bool:
        # Nothing in here may depend on when blocks are asked for: a stream is the call, bit for bit.
        clean, _, prompt_embeds = self.last
        return (
            self.packs_blocks
            and self.context is None
            and prompt_embeds is self.prompt_embeds
            and clean.shape == latents.shape
            and self.kv_cache.can_pair(clean.shape[2], self.pipe.transformer.config)
        )

    def begin_scene(self, transition: str, global_sink: bool):
        """Of `TRANSITIONS`, before the block that begins the scene, whose `prompt_embeds` are set."""
        # LoRAs may be others since the last block, which may have still to enter the cache.
        self.kv_cache.set_text(None)
        if transition == "recache":
            self.recache(global_sink)
        elif transition in ("flush", "rope_cut"):
            self.remember()
            transformer = self.pipe.transformer
            self.kv_cache.flush(transformer.config, transformer.rope, cut=transition == "rope_cut")
        elif transition == "cut":
            self.restart()

    def recache(self, global_sink: bool):
        """Compute the cache anew, as if the frames in the window had been made with the current prompt (LongLive).

        All in one pass, in which every frame sees every other. With `global_sink` the sink stays as it is once frames
        have left the window; otherwise the first frames in the window become the sink. So does the frame that a flush
        has put before others, until the window is full again.
        """
        if self.history is None:
            return
        self.remember()
        config, cache = self.pipe.transformer.config, self.kv_cache
        num_frames, window = cache.num_frames, config.local_attn_size
        first, num_kept = cache.first_frame, 0
        if window != -1 and num_frames - first > window:
            num_kept = config.sink_size if global_sink else 0
            first = num_frames - window + num_kept
        elif cache.has_gap:
            num_kept = int(global_sink and cache.keeps_first)
            first += 1
        cache.rewind(first, num_kept)
        clean = self.history[:, :, first - num_frames :]
        self.predict(clean, clean.new_zeros(1), self.prompt_embeds, self.store_mode)

    def denoise(
        self,
        noise: torch.Tensor,
        original: torch.Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """The next block, clean latents, of noise `(B, C, n, h, w)` float32, or of `original` latents with that noise.
        A `FloatingPointError` if it has NaN or infinite values."""
        pipe, scheduler, sampling = self.pipe, self.scheduler, self.sampling
        # For every block anew: since the last one the text may be another, and LoRAs may have been loaded.
        self.kv_cache.set_text(self.prompt_embeds)
        levels = sampling.sigmas if self.num_generated else sampling.first_block_sigmas
        sampling.call.num_timesteps = len(levels)
        # The published samplers look noise levels up in a table that ends at 1 / 1000: t = 0 has that one.
        floor = 1 / scheduler.config.num_train_timesteps
        scheduler.set_timesteps(sigmas=[max(level, floor) for level in levels], device=noise.device)
        latents = noise if original is None else torch.lerp(original, noise, scheduler.sigmas[0])
        for i, level in enumerate(levels):
            t = scheduler.timesteps[i] * (level > 0)
            sampling.call.timestep = t
            flow = self.read(latents, t).float()
            # What `scheduler.step` computes; but it draws noise of another layout, and after the last step too: what
            # the published samplers generate from a seed would not come out.
            latents = clean = latents - scheduler.sigmas[i] * flow
            if i + 1 < len(levels):
                fresh = draw_noise(latents.shape, generator, latents.device, self.dtype, non_blocking=True)
                latents = torch.lerp(clean, fresh, scheduler.sigmas[i + 1])
            if sampling.callback_on_step_end is not None:
                values = {"latents": latents, "prompt_embeds": self.prompt_embeds}
                callback_kwargs = {k: values[k] for k in sampling.callback_on_step_end_tensor_inputs}
                outputs = sampling.callback_on_step_end(pipe, i, t, callback_kwargs) or {}
                latents = outputs.pop("latents", latents)
                self.prompt_embeds = outputs.pop("prompt_embeds", self.prompt_embeds)
                self.kv_cache.set_text(self.prompt_embeds)  # it may also have switched a LoRA
            if sampling.call.interrupt and i + 1 < len(levels):
                latents = clean  # the noise is for the next step, which is not made
                break
        sampling.call.timestep = None
        check_finite(latents, "latents")
        return latents

    def finish(self, latents: torch.Tensor, given: bool = False) -> torch.Tensor:
        """Take up a clean block, generated or given. Returns frames `(B, 3, F, H, W)` in [-1, 1], or the latents."""
        self.remember()
        self.num_given += given
        self.num_generated += not given
        frames = self.decoder.decode(latents) if self.sampling.decode else None
        if frames is not None:
            check_finite(frames, "frames")
        self.last = (latents, frames, self.prompt_embeds)
        # A context that is encoded anew has no cache to compute anew.
        if self.context is None:
            window = self.pipe.transformer.config.local_attn_size
            history = latents if self.history is None else torch.cat([self.history, latents], dim=2)
            self.history = history if window == -1 else history[:, :, -window:]
        return latents if frames is None else frames


def blend_scenes(old: torch.Tensor, scene: EncodedScene, num_blocks: int) -> list[EncodedScene]:
    """A scene whose text comes over `num_blocks` blocks, from the `old` one `(L, dim)` to its own, both included; of
    one block at once."""
    weights = torch.linspace(0, 1, num_blocks).tolist() if num_blocks > 1 else [1.0]
    texts = [torch.lerp(old, scene.prompt_embeds, weight) for weight in weights]
    return [replace(scene, prompt_embeds=text, start=scene.start + i) for i, text in enumerate(texts)]


def begin_scenes(groups: list[BlockGenerator], schedule: list[list[EncodedScene]], block: int) -> list[BlockGenerator]:
    """Take up the scenes that begin with `block`, out of the schedule. Videos part whose transitions differ, for
    theirs is another past."""
    beginning = {}
    for video, scenes in enumerate(schedule):
        due = list(itertools.takewhile(lambda scene: scene.start <= block, scenes))
        if due:
            # One after the other began a while ago while the text was still changing: the last one counts.
            strongest = max(due, key=lambda scene: TRANSITIONS.index(scene.transition))
            beginning[video] = replace(strongest, prompt_embeds=due[-1].prompt_embeds)
            del scenes[: len(due)]
    result = []
    for group in groups:
        scenes = [beginning.get(video) for video in group.videos]
        if any(scenes):
            embeds = [scene.prompt_embeds if scene else old for scene, old in zip(scenes, group.prompt_embeds)]
            group.prompt_embeds = torch.stack(embeds)
        ways = [(scene.transition, scene.global_sink) if scene else ("roll", True) for scene in scenes]
        for way in sorted(set(ways), key=lambda way: TRANSITIONS.index(way[0])):
            rows = [row for row, other in enumerate(ways) if other == way]
            part = group if len(rows) == len(ways) else group.select(rows)
            part.begin_scene(*way)
            result.append(part)
    return result
