"""A K/V cache of several videos that go on from one."""

from dataclasses import replace

import torch

from .kv_cache import BoundedSlots, CausalWanKVCache, RingSlots, growing
from .rotary import CausalWanRotaryPosEmbed


class SharedPastKVCache(CausalWanKVCache):
    """The K/V of videos that go on from a single one, whose own are kept once, for all of them.

    The frames since then have slots of their own: a ring of the size that window and sink leave, or as many as the
    longest video needs. Of the past's frames the sink stays in sight, and of the others the newest that the window
    still reaches; a view, or a copy of a few frames of one video.

    Args:
        past: the cache of the single video, with the model's sink at least; not to be written while this one is used.
        num_videos: how many go on from it.
        max_frames: the longest of them in latent frames, the past included; needed if the window is unlimited.
    """

    def __init__(self, past: CausalWanKVCache, num_videos: int, max_frames: int | None):
        state = past.state
        if state.num_frames < max(state.slots.sink_size, 1) or past.past_weight != 1:
            raise ValueError(
                f"a past can be shared that has at least one block and the sink, {state.slots.sink_size} latent "
                f"frames, and `past_weight=1`; this one has {state.num_frames} and {past.past_weight}."
            )
        super().__init__(0, max_frames)
        self.past = past
        self._seen = None  # ranges of the past's tokens that the layers have, and where the sink was then
        shape = (num_videos, *state.shape[1:])
        self.state = replace(
            state, num_cached=0, first_frame=state.num_frames, margin_frames=0, shape=shape, rewound=False
        )
        if isinstance(state.slots, RingSlots):
            self.state.slots = RingSlots(state.slots.capacity - state.slots.sink_size, 0)
        else:
            self.state.slots = BoundedSlots(max_frames - state.num_frames - state.block_frames)
        self.layer_caches = [layer_cache.go_on(self.state, num_videos) for layer_cache in past.layer_caches]

    def can_pair(self, num_frames: int, config) -> bool:
        # What is seen of the past changes from the first block to the second.
        return False

    def begin_block(self, *args, **kwargs):
        super().begin_block(*args, **kwargs)
        self._see_past()

    def place_sink(self, position: int, rope: CausalWanRotaryPosEmbed, device: torch.device):
        # The sink is the past's.
        self.past.place_sink(position, rope, device)
        self._see_past()

    def _see_past(self):
        # Ranges of tokens in the past's buffers that the next block sees, neighbours joined.
        past = self.past.state
        ranges = []
        for slot in reversed(past.slots.still_seen(past.num_frames - past.first_frame, self.state.num_cached)):
            tokens = past.tokens(slot)
            if ranges and ranges[-1].stop == tokens.start:
                tokens = slice(ranges.pop().start, tokens.stop)
            ranges.append(tokens)
        # The same in all steps of a block.
        seen = ranges, self.past.layer_caches[0]._sink_shift
        if seen == self._seen:
            return
        self._seen = seen
        for layer_cache, past_layer in zip(self.layer_caches, self.past.layer_caches):
            layer_cache.past = (_joined(past_layer.key, ranges), _joined(past_layer.value, ranges)) if ranges else None


def share_past(past: CausalWanKVCache, num_videos: int, max_frames: int | None) -> CausalWanKVCache:
    """The cache of videos that go on from a single one, whose cache is not to be written while this one is used: a
    [`SharedPastKVCache`], or copies of `past` where what a video adds changes what it sees of that: of frames that are
    seen from afar until then, or a sink that it completes, after a flush; and where the past has a weight."""
    state = past.state
    has_sink = state.num_frames - state.first_frame >= state.slots.sink_size
    if past.shares_past and has_sink and not state.cut and past.past_weight == 1:
        return SharedPastKVCache(past, num_videos, max_frames)
    return past.select([0] * num_videos)


def _joined(buffer: torch.Tensor, ranges: list[slice]) -> torch.Tensor:
    """A view of one range of tokens, or a copy of several."""
    parts = [buffer[:, tokens] for tokens in ranges]
    return growing(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
