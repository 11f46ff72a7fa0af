"""A K/V cache of several videos that go on from one."""

import torch

from .kv_cache import CausalWanKVCache, CausalWanKVLayerCache
from .rotary import Rotary


class ForkedKVLayerCache(CausalWanKVLayerCache):
    """Keys and values of the frames since the fork; those before are the past's."""

    def __init__(self, cache: "ForkedKVCache", past: CausalWanKVLayerCache):
        super().__init__(cache)
        self._past = past

    def shared(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        ranges = self._cache.past_tokens()
        if not ranges:
            return None
        if len(ranges) == 1:
            return tuple(x[:, slice(*ranges[0])] for x in (self._past.key, self._past.value))
        return tuple(torch.cat([x[:, slice(*r)] for r in ranges], dim=1) for x in (self._past.key, self._past.value))

    def shift_sink(self, shift: int, rotary: Rotary):
        self._past.shift_sink(shift, rotary)


class ForkedKVCache(CausalWanKVCache):
    """The K/V of videos that go on from a single one, whose own are kept once, for all of them.

    The frames since the fork have slots of their own: a ring of the size that window and sink leave, or as many as the
    longest video needs. Of the past's frames the sink stays in sight, and of the others the newest that the window
    still reaches; a view, or a copy of a few frames of one video.

    Args:
        past: the cache of the single video, with the model's sink at least; not to be written while this one is used.
        num_videos: how many go on from it.
        max_frames: the longest of them in latent frames, the past included; needed if the window is unlimited.
    """

    def __init__(self, past: CausalWanKVCache, num_videos: int, max_frames: int | None):
        if past.num_frames < max(past.sink_size, 1) or past.past_weight != 1:
            raise ValueError(
                f"a cache can be forked that has at least one block and the sink, {past.sink_size} latent frames, and "
                f"`past_weight=1`; this one has {past.num_frames} and {past.past_weight}."
            )
        super().__init__(0, max_frames)
        self.past = past
        self.fork_start = self.num_frames = past.num_frames
        for name in ("sink_start", "sink_size", "block_frames", "frame_tokens", "_ring"):
            setattr(self, name, getattr(past, name))
        self._shape = (num_videos, *past._shape[1:])
        if self._ring:
            self.capacity = past.capacity - past.sink_size
        else:
            self.capacity = max_frames - self.fork_start - self.block_frames
        self.layer_caches = [ForkedKVLayerCache(self, layer) for layer in past.layer_caches]

    def slot(self, frame: int) -> int | None:
        own = frame - self.fork_start
        if own < self.capacity:
            return own
        return own % self.capacity if self._ring and self.capacity else None

    def past_tokens(self) -> list[tuple[int, int]]:
        """Ranges of tokens in the past's buffers that the next block sees."""
        past, size = self.past, self.frame_tokens
        slots = list(range(past.num_cached))
        if self._ring and self.num_cached:
            # Own frames have pushed the oldest ones out of the window.
            num_left = min(past.num_cached - past.sink_size, self.capacity - self.num_cached)
            newest = range(self.fork_start - num_left, self.fork_start)
            slots = sorted([*range(past.sink_size), *(past.slot(frame) for frame in newest)])
        # Slot 0 is the rightmost one. Neighbours are joined.
        ranges = []
        for slot in reversed(slots):
            start = (past.capacity - 1 - slot) * size
            if ranges and ranges[-1][1] == start:
                ranges[-1] = (ranges[-1][0], start + size)
            else:
                ranges.append((start, start + size))
        return ranges
