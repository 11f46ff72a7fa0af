"""The transformer on noised clips, as the policies are compared in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..models.kv_cache import CausalWanKVCache
from ..models.kv_cache_fork import ForkedKVCache
from .nft.loss import predicted_clean


@dataclass
class NoisedBatch:
    """Sampled videos, and the window of them that is trained, with noise. Latents are float32.

    Attributes:
        clean: `(B, C, F, h, w)`; what is before the window is its past.
        noisy: `(B, C, W, h, w)`, the last `W` frames with noise.
        sigma, timestep: `(B,)`, the noise level in (0, 1] and 1000 times that.
        prompt_embeds: `(B, L, D)`.
        optimality: `(B,)` in [0, 1].
        weight: `(B,)`, of the sample's loss; 0 if it is skipped.
        kl_weight: `(B,)`, of its distance to the reference; 0 if it is not held to it.
        use_reference: whether a sample of this batch has a `kl_weight`, here or on another process.
        shared_past: all videos have the same frames before the window.
    """

    clean: torch.Tensor
    noisy: torch.Tensor
    sigma: torch.Tensor
    timestep: torch.Tensor
    prompt_embeds: torch.Tensor
    optimality: torch.Tensor
    weight: torch.Tensor
    kl_weight: torch.Tensor
    use_reference: bool = True
    shared_past: bool = False

    @property
    def window_start(self) -> int:
        """Latent frames before the window."""
        return self.clean.shape[2] - self.noisy.shape[2]


class BlockwiseModel:
    """Predictions for a window block by block as in inference: every noisy block sees the clean ones before it.

    The K/V of the clean blocks are those of the policy that is active when they are stored and carry no gradient, so
    that each block has a graph of its own and its backward pass may run at once: memory follows one block, not the
    window, and not what lies before it.

    Args:
        transformer: the [`CausalWanTransformer3DModel`] itself, with the policy active that the past is stored with.
        batch: the clips.
        take_turns: several policies predict from these K/V. What is cached of the text is of one policy.
    """

    def __init__(self, transformer, batch: NoisedBatch, take_turns: bool = False):
        self.transformer = transformer
        self.batch = batch
        self.take_turns = take_turns
        self.num_frames = batch.clean.shape[2]
        self.block_frames = transformer.config.num_frames_per_block
        past, shared = batch.window_start, batch.shared_past
        # Latent frames of the video.
        self.blocks = self._blocks(past, self.num_frames)
        rows = 1 if shared else None
        # Nothing follows a cache's last block, but the window follows a shared past.
        max_frames = past + self.block_frames if shared else self.num_frames
        self.cache = CausalWanKVCache(transformer.config.num_layers, max_frames=max_frames)
        for frames in self._blocks(0, past):
            self._store(batch.clean[:rows, :, frames], batch.prompt_embeds[:rows], frames)
        if shared:
            self.cache = ForkedKVCache(self.cache, len(batch.clean), self.num_frames)

    def _blocks(self, start: int, stop: int) -> list[slice]:
        return [slice(first, first + self.block_frames) for first in range(start, stop, self.block_frames)]

    def predict(self, frames: slice, forward=None) -> torch.Tensor:
        """Clean latents `(B, C, n, h, w)` of a block of the window, predicted from its noisy ones.

        Args:
            forward: what computes it: the transformer itself, or what DDP made of it.
        """
        batch, past = self.batch, self.batch.window_start
        noisy = batch.noisy[:, :, frames.start - past : frames.stop - past]
        if self.take_turns:
            self.cache.reset_text()
        velocity = (forward or self.transformer)(
            noisy.to(self.transformer.dtype),
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

    @torch.no_grad()
    def _store(self, clean: torch.Tensor, prompt_embeds: torch.Tensor, frames: slice):
        if self.take_turns:
            self.cache.reset_text()
        self.transformer(
            clean.to(self.transformer.dtype),
            clean.new_zeros(len(clean)),
            prompt_embeds,
            kv_cache=self.cache,
            kv_cache_mode="write",
            frame_offset=frames.start,
            return_dict=False,
        )

    def predict_window(self) -> dict[int, torch.Tensor]:
        """The predictions for all blocks, by their first frames."""
        predictions = {}
        for frames in self.blocks:
            predictions[frames.start] = self.predict(frames)
            self.advance(frames)
        return predictions


class NoisyClipModel:
    """As the [`BlockwiseModel`] of a whole clip, but every block sees noisy ones: one pass with one graph, through the
    context too. The code released with Astrolabe does this, with the same noise level in all blocks and, of a model
    with a window, the window alone: `local_attn_size` frames that end with the block, and no sink."""

    def __init__(self, transformer, batch: NoisedBatch, take_turns: bool = False):
        self.transformer = transformer
        self.batch = batch
        self.blocks = [slice(0, batch.clean.shape[2])]

    def predict(self, frames: slice, forward=None) -> torch.Tensor:
        batch = self.batch
        with _without_sink(self.transformer):
            velocity = (forward or self.transformer)(
                batch.noisy.to(self.transformer.dtype), batch.timestep, batch.prompt_embeds, return_dict=False
            )[0]
        return predicted_clean(batch.noisy, velocity.float(), batch.sigma)

    def advance(self, frames: slice):
        pass

    def predict_window(self) -> dict[int, torch.Tensor]:
        return {0: self.predict(self.blocks[0])}


@contextmanager
def _without_sink(transformer) -> Iterator[None]:
    """The model's forward passes inside see the window only, whatever sink its config names."""
    sink_size = transformer.config.sink_size
    transformer.register_to_config(sink_size=0)
    try:
        yield
    finally:
        transformer.register_to_config(sink_size=sink_size)


CLIP_MODELS = {"clean": BlockwiseModel, "noisy": NoisyClipModel}
