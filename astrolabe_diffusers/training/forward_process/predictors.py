"""What predicts the clean blocks of noised videos, as policies are compared in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ...models.kv_cache_shared_past import SharedPastKVCache
from ..policies import use_policy
from .noising import NoisedBatch, predicted_clean


class BlockwisePredictor:
    """Predictions for a window block by block as in inference: every noisy block sees the clean ones before it.

    The K/V of the clean blocks are those of one policy, for all that predict from them, and carry no gradient, so that
    each block has a graph of its own and its backward pass may run at once: memory follows one block, not the window,
    and not what lies before it.

    Args:
        transformer: the [`CausalTransformer`] itself.
        batch: the videos.
        past_policy: whose K/V the clean blocks have, one of `POLICIES`.

    Attributes:
        blocks: the frames of each block of the window, to be predicted one after the other.
    """

    def __init__(self, transformer, batch: NoisedBatch, past_policy: str):
        self.transformer = transformer
        # Asked for once: diffusers goes through all modules for the answer.
        self.dtype = transformer.dtype
        self.batch = batch
        self.past_policy = past_policy
        self.num_frames = batch.clean.shape[2]
        self.block_frames = transformer.config.num_frames_per_block
        past = batch.past
        self.blocks = self._split(past.num_frames, self.num_frames)
        # Nothing follows a cache's last block, but the window follows a shared past.
        max_frames = past.num_frames + self.block_frames if past.shared else self.num_frames
        self.cache = transformer.new_kv_cache(max_frames)
        for frames in self._split(0, past.num_frames):
            self._store(past.rows(batch.clean[:, :, frames]), past.rows(batch.prompt_embeds), frames)
        if past.shared:
            self.cache = SharedPastKVCache(self.cache, len(batch.clean), self.num_frames)

    def _split(self, start: int, stop: int) -> list[slice]:
        return [slice(first, first + self.block_frames) for first in range(start, stop, self.block_frames)]

    def predict(self, frames: slice, forward=None) -> torch.Tensor:
        """Clean latents `(B, C, n, h, w)` of a block, as the current policy predicts them from its noisy ones.

        Args:
            forward: what computes it: the transformer itself, or what DDP made of it.
        """
        return self._predict(frames, forward or self.transformer)

    def predict_as(self, policy: str, frames: slice) -> torch.Tensor:
        """As [`~BlockwisePredictor.predict`], by another policy and without gradients."""
        with use_policy(self.transformer, policy):
            return self._predict(frames, self.transformer)

    def _predict(self, frames: slice, forward) -> torch.Tensor:
        batch, past = self.batch, self.batch.past.num_frames
        noisy = batch.noisy[:, :, frames.start - past : frames.stop - past]
        velocity = forward(
            noisy.to(self.dtype),
            batch.timestep,
            batch.prompt_embeds,
            kv_cache=self.cache,
            kv_cache_mode="read",
            frame_offset=frames.start,
            return_dict=False,
        )[0]
        return predicted_clean(noisy, velocity.float(), batch.sigma)

    def advance(self, frames: slice):
        """Store the K/V of a clean block for those that follow. Nothing follows the last one."""
        if frames.stop < self.num_frames:
            self._store(self.batch.clean[:, :, frames], self.batch.prompt_embeds, frames)

    def _store(self, clean: torch.Tensor, prompt_embeds: torch.Tensor, frames: slice):
        with use_policy(self.transformer, self.past_policy):
            self.transformer(
                clean.to(self.dtype),
                clean.new_zeros(len(clean)),
                prompt_embeds,
                kv_cache=self.cache,
                kv_cache_mode="write",
                frame_offset=frames.start,
                return_dict=False,
            )

    def predict_window(self) -> dict[int, torch.Tensor]:
        """The predictions of `past_policy` for all blocks, by their first frames."""
        predictions = {}
        for frames in self.blocks:
            predictions[frames.start] = self.predict_as(self.past_policy, frames)
            self.advance(frames)
        return predictions


class WholeClipPredictor:
    """As the [`BlockwisePredictor`] of a whole clip, but every block sees noisy ones: one pass with one graph, through
    the context too. The code released with Astrolabe does this, with the same noise level in all blocks and, of a
    model with a window, the window alone: `local_attn_size` frames that end with the block, and no sink."""

    def __init__(self, transformer, batch: NoisedBatch, past_policy: str):
        self.transformer = transformer
        # Asked for once: diffusers goes through all modules for the answer.
        self.dtype = transformer.dtype
        self.batch = batch
        self.past_policy = past_policy
        self.blocks = [slice(0, batch.clean.shape[2])]

    def predict(self, frames: slice, forward=None) -> torch.Tensor:
        batch = self.batch
        with _without_sink(self.transformer):
            velocity = (forward or self.transformer)(
                batch.noisy.to(self.dtype), batch.timestep, batch.prompt_embeds, return_dict=False
            )[0]
        return predicted_clean(batch.noisy, velocity.float(), batch.sigma)

    def predict_as(self, policy: str, frames: slice) -> torch.Tensor:
        with use_policy(self.transformer, policy):
            return self.predict(frames)

    def advance(self, frames: slice):
        pass

    def predict_window(self) -> dict[int, torch.Tensor]:
        return {0: self.predict_as(self.past_policy, self.blocks[0])}


@contextmanager
def _without_sink(transformer) -> Iterator[None]:
    """The model's forward passes inside see the window only, whatever sink its config names."""
    sink_size = transformer.config.sink_size
    transformer.register_to_config(sink_size=0)
    try:
        yield
    finally:
        transformer.register_to_config(sink_size=sink_size)


# By the setting `context`.
PREDICTORS = {"clean": BlockwisePredictor, "noisy": WholeClipPredictor}
