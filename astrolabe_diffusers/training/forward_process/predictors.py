"""What predicts the clean blocks of noised videos, as policies are compared in training."""

from inspect import signature
from typing import Any

import torch

from ...errors import UserError
from ...models.contract import packs_clips, store_mode
from ...models.expert_pair import experts_of
from ...models.kv_cache import CausalWanKVCache
from ...models.kv_cache_clip import ClipKVCache
from ...models.kv_cache_shared_past import share_past
from ...pipelines.block_generation import Sampling, begin_scenes
from ...rollout.past import Switch
from ...rollout.sampling import encode_scenes
from ..policies import use_policy
from .config import BlockwiseConfig
from .noising import NoisedBatch, predicted_clean


class BlockwisePredictor:
    """Predictions for a window block by block as in inference: every noisy block sees the clean ones before it.

    The K/V of the clean blocks are those of one policy, for all that predict from them, and carry no gradient, so that
    a pass has a graph of its own and its backward pass may run at once: memory follows the blocks of a pass, not the
    window, and not what lies before it.

    Args:
        transformer: the [`CausalTransformer`] itself.
        past_policy: whose K/V the clean blocks have, one of `POLICIES`.
        blocks_per_pass: how many blocks go through the transformer together, clean ones or noisy ones; one of a
            transformer that does not have `packs_clips`, and of a pipeline with a `past_weight` of its own.

    Attributes:
        blocks: the frames of each block of the window.
        passes: the frames of each pass over it, to be predicted one after the other.
    """

    def __init__(self, transformer, batch: NoisedBatch, past_policy: str, blocks_per_pass: int = 1):
        self.transformer, self.batch, self.past_policy = transformer, batch, past_policy
        # Asked for once: diffusers goes through all modules for the answer.
        self.dtype, self.store_mode = transformer.dtype, store_mode(transformer)
        self._begin(batch.clean.shape[2], blocks_per_pass)

    def _begin(self, num_frames: int, blocks_per_pass: int):
        transformer, batch, past = self.transformer, self.batch, self.batch.past
        size = transformer.config.num_frames_per_block
        past_weight = batch.pipeline.config.past_weight
        packs = blocks_per_pass > 1 and packs_clips(transformer) and past_weight == 1
        pass_size = size * blocks_per_pass if packs else size
        self.blocks = _parts(past.num_frames, num_frames, size)
        self.passes = _parts(past.num_frames, num_frames, pass_size)
        if packs:
            self.cache = ClipKVCache(transformer.config.num_layers)
        else:
            # Nothing follows a cache's last block, but what goes on from a shared past in a cache of its own.
            goes_on = past.shared and past_weight == 1
            self.cache = transformer.new_kv_cache(past.num_frames + size if goes_on else num_frames, past_weight)
        for frames in _parts(0, past.num_frames, pass_size):
            self._store(past.rows(batch.clean[:, :, frames]), past.rows(batch.prompt_embeds))
        if past.shared and not packs:
            self.cache = share_past(self.cache, len(batch.clean), num_frames)
        self._prepare(self.passes[0])

    def predict(self, frames: slice, forward=None) -> torch.Tensor:
        """Clean latents `(B, C, F, h, w)` of a pass, as the active policy predicts them from its noisy ones; by the
        transformer itself, or by `forward`, what DDP made of it."""
        batch, past = self.batch, self.batch.past.num_frames
        noisy = batch.noisy[:, :, frames.start - past : frames.stop - past]
        velocity = (forward or self.transformer)(
            noisy.to(self.dtype), batch.timestep, self._text(), **self._context(frames), return_dict=False
        )[0]
        return predicted_clean(noisy, velocity.to(noisy.dtype), batch.sigma)

    def _context(self, frames: slice) -> dict[str, Any]:
        """The arguments of a pass that say what its blocks see before them."""
        return {"kv_cache": self.cache, "kv_cache_mode": "read", "frame_offset": frames.start}

    def _text(self) -> torch.Tensor:
        """Of the next pass, `(B, L, D)`."""
        return self.batch.prompt_embeds

    def predict_as(self, policy: str, frames: slice) -> torch.Tensor:
        """As [`~BlockwisePredictor.predict`], by another policy and without gradients."""
        with use_policy(self.transformer, policy):
            return self.predict(frames)

    def advance(self, frames: slice):
        """After a pass: store the K/V of the clean blocks that the next one sees. Nothing follows the last one."""
        if frames != self.passes[-1]:
            self._prepare(self.passes[self.passes.index(frames) + 1])

    def _prepare(self, frames: slice):
        # All that its last block sees.
        clean = slice(self.cache.num_frames, frames.stop - self.transformer.config.num_frames_per_block)
        if clean.start < clean.stop:
            self._store(self.batch.clean[:, :, clean], self.batch.prompt_embeds)

    def _store(self, clean: torch.Tensor, prompt_embeds: torch.Tensor):
        with use_policy(self.transformer, self.past_policy):
            self.transformer(
                clean.to(self.dtype),
                clean.new_zeros(len(clean)),
                prompt_embeds,
                kv_cache=self.cache,
                kv_cache_mode=self.store_mode,
                frame_offset=self.cache.num_frames,
                return_dict=False,
            )

    def predict_window(self) -> dict[int, torch.Tensor]:
        """The predictions of `past_policy` of all passes, by their first frames."""
        predictions = {}
        for frames in self.passes:
            predictions[frames.start] = self.predict_as(self.past_policy, frames)
            self.advance(frames)
        return predictions


class SwitchPredictor(BlockwisePredictor):
    """After a switch of the prompt: the clean blocks are taken up by the [`BlockGenerator`] that makes the videos, so
    that its cache is that of the rollout, whatever the transition. A pass has one block."""

    def _begin(self, num_frames: int, blocks_per_pass: int):
        batch, past, size = self.batch, self.batch.past, self.transformer.config.num_frames_per_block
        self.blocks = self.passes = _parts(past.num_frames, num_frames, size)
        texts = torch.stack([past.rows(batch.old_prompt_embeds), past.rows(batch.prompt_embeds)], dim=1)
        switches = [Switch(), past.switch]
        self.schedule = [encode_scenes(prompt_embeds, switches, size) for prompt_embeds in texts]
        sampling = Sampling([], [], max_frames=num_frames, decode=False)
        videos = list(range(len(texts)))
        self.generator = batch.pipeline.block_generator_class(batch.pipeline, sampling, videos)
        self.generator.prompt_embeds = texts[:, 0]
        for frames in _parts(0, past.num_frames, size):
            self._take_up(past.rows(batch.clean[:, :, frames]), frames.stop)
        if past.shared:
            self.generator = self.generator.share_past(len(batch.clean))
            self.schedule = [list(self.schedule[0]) for _ in batch.clean]

    @property
    def cache(self) -> CausalWanKVCache:
        return self.generator.kv_cache

    def _take_up(self, clean: torch.Tensor, stop: int):
        with use_policy(self.transformer, self.past_policy):
            self.generator.finish(clean)
            # The videos of a batch have the same switch, so none parts from the others.
            begin_scenes([self.generator], self.schedule, stop // self.transformer.config.num_frames_per_block)
            self.generator.remember()

    def _text(self) -> torch.Tensor:
        return self.generator.prompt_embeds

    def _context(self, frames: slice) -> dict[str, Any]:
        # After a cut the video begins anew.
        return super()._context(frames) | {"frame_offset": self.cache.num_frames}

    def advance(self, frames: slice):
        if frames != self.passes[-1]:
            self._take_up(self.batch.clean[:, :, frames], frames.stop)


class TeacherForcingPredictor(BlockwisePredictor):
    """A whole window in one pass with one graph, beside its clean blocks, whose K/V have gradients too, into the
    memory transformer where there is one. What is before the window is constant, and needs a transformer that has
    `packs_clips`."""

    def _begin(self, num_frames: int, blocks_per_pass: int):
        past, config = self.batch.past, self.transformer.config
        self.blocks = _parts(past.num_frames, num_frames, config.num_frames_per_block)
        self.passes = [slice(past.num_frames, num_frames)]
        # Empty without a past, and then not looked at.
        self.cache = ClipKVCache(config.num_layers)
        for frames in _parts(0, past.num_frames, config.num_frames_per_block * blocks_per_pass):
            self._store(past.rows(self.batch.clean[:, :, frames]), past.rows(self.batch.prompt_embeds))

    def _context(self, frames: slice) -> dict[str, Any]:
        clean = {"clean_hidden_states": self.batch.clean[:, :, frames].to(self.dtype)}
        return super()._context(frames) | clean if self.batch.past.num_frames else clean


class WholeClipPredictor(BlockwisePredictor):
    """A whole clip as one block, whose blocks see noisy ones: one pass with one graph, through the context too. The
    code released with Astrolabe does this, with the same noise level in all blocks and, of a model with a window, the
    window alone: `local_attn_size` frames that end with the block, and no sink."""

    def _begin(self, num_frames: int, blocks_per_pass: int):
        self.blocks = self.passes = [slice(0, num_frames)]

    def predict(self, frames: slice, forward=None) -> torch.Tensor:
        batch, sink_size = self.batch, self.transformer.config.sink_size
        self.transformer.register_to_config(sink_size=0)
        try:
            velocity = (forward or self.transformer)(
                batch.noisy.to(self.dtype), batch.timestep, batch.prompt_embeds, return_dict=False
            )[0]
        finally:
            self.transformer.register_to_config(sink_size=sink_size)
        return predicted_clean(batch.noisy, velocity.float(), batch.sigma)


def check_context(config: BlockwiseConfig, transformer, has_past: bool = False, past_weight: float = 1.0):
    """A [`UserError`] where a transformer cannot be given the context of the settings; `has_past` if something may lie
    before what is trained, `past_weight` as of the pipeline."""
    experts = experts_of(transformer).values()
    if config.context == "noisy" and len(experts) > 1:
        raise UserError(
            "context=noisy has no pass of the memory transformer, and this model's blocks see nothing else: set "
            "context=clean or clean_grad."
        )
    if config.context == "noisy" and has_past:
        raise UserError("context=noisy trains a whole video in one pass: no sample_frames before it.")
    if config.context != "clean" and past_weight != 1:
        raise UserError(f"past_weight={past_weight:g} weighs clean frames in a cache: train with context=clean.")
    if config.context != "clean" and getattr(transformer.config, "memory_bank_size", 0):
        raise UserError("the model's memory bank is made block by block, of clean frames: train with context=clean.")
    if config.context != "clean_grad":
        return
    if "clean_hidden_states" not in signature(transformer.forward).parameters:
        raise UserError("context=clean_grad needs a transformer that takes `clean_hidden_states`: set context=clean.")
    if (len(experts) > 1 or has_past) and not packs_clips(transformer):
        raise UserError("this transformer has one block a pass (no `packs_clips`): set context=clean.")
    if len(experts) > 1 and has_past:
        raise UserError("context=clean_grad trains whole videos of two experts: no window_size or sample_frames.")


def _parts(start: int, stop: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


# By the setting `context`.
PREDICTORS = {"clean": BlockwisePredictor, "clean_grad": TeacherForcingPredictor, "noisy": WholeClipPredictor}


def predictor_class(context: str, batch: NoisedBatch) -> type[BlockwisePredictor]:
    """Of `PREDICTORS`, or that of a batch whose past has a switch of the prompt, which needs a clean context."""
    return PREDICTORS[context] if batch.past.switch is None else SwitchPredictor
