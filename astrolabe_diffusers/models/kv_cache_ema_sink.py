"""A K/V cache whose sink remembers, faintly, the frames that have left the window (Reward Forcing)."""

from dataclasses import dataclass
from itertools import groupby

import torch

from .kv_cache import CausalWanKVCache, CausalWanKVLayerCache, KeyValue, KVCacheState
from .rotary import CausalWanRotaryPosEmbed, Rotary, apply_rotary


@dataclass(frozen=True)
class SinkEMA:
    """
    How the sink takes up a frame that leaves the window (Reward Forcing, arXiv 2512.04678): of keys and of values,
    `sink = decay * sink + (1 - decay) * frame`.

    Frame f goes into frame `f % sink_size` of the sink: a block into one as long, frame by frame. Its keys are turned
    back to the position of the sink's frame before, which stays where it is in time.

    Args:
        upcast: blend in float32 and keep the sink in it. In bfloat16, with a decay of 0.999, most of what is added is
            lost in rounding, and the sink hardly moves.
    """

    decay: float
    sink_size: int
    upcast: bool
    rope: CausalWanRotaryPosEmbed

    def rotation_back(self, lap: int) -> Rotary:
        """From the positions of frames `lap * sink_size ..` to those of the sink."""
        cos, sin = self.rope.shift(lap * self.sink_size, self.rope.freqs_cos.device)
        return cos, -sin

    def dtype(self, x: torch.Tensor) -> torch.dtype:
        """Of the sink of keys or values like `x`."""
        return torch.float32 if self.upcast else x.dtype

    def blend(self, sink: KeyValue, leaving: KeyValue, rotation_back: Rotary) -> KeyValue:
        """The sink's keys and values, `(batch, tokens, heads, head_dim)`, when it has taken up as many tokens. A batch
        of one goes with any other."""
        key, value = (x.to(self.dtype(x)) for x in leaving)
        pairs = zip(sink, (apply_rotary(key, rotation_back), value))
        return tuple(self.decay * old.to(new.dtype) + (1 - self.decay) * new for old, new in pairs)


@dataclass
class EMASinkState(KVCacheState):
    ema: SinkEMA | None = None

    def leaving(self, num_frames: int) -> range:
        """The frames that leave the window when `num_frames` enter, counted from the one in slot 0."""
        if self.rewound and self.num_cached:
            # The sink stayed, and has taken up those that leave before they were written anew.
            return range(0)
        sink_size, ring = self.slots.sink_size, self.slots.capacity - self.slots.sink_size
        stored = self.num_frames - self.first_frame
        return range(max(stored - ring, sink_size), max(stored + num_frames - ring, sink_size))


class EMASinkKVLayerCache(CausalWanKVLayerCache):
    """As the parent, with a sink that takes up what leaves: as the block is stored that pushes it out, so that every
    pass of the next block, however many there are, finds the sink as it has to be."""

    state: EMASinkState

    def forget_sink(self):
        super().forget_sink()
        # As `_sink_key`, at the sink's own positions; both are None until something has left.
        self._sink_value: torch.Tensor | None = None

    def select(self, videos: list[int], state: EMASinkState) -> "EMASinkKVLayerCache":
        other = super().select(videos, state)
        other._sink_value = None if self._sink_value is None else self._sink_value[videos]
        return other

    def begin_pair(self, seen: slice, places: torch.Tensor, leaving: torch.Tensor):
        super().begin_pair(seen, places, leaving)
        # The first block sees the copy of the sink in the margin, the second one this.
        self._take_up(self._leaving(len(places) // 2))

    def commit(self):
        if self._stored is None:
            return
        leaving = self._leaving(self._stored[0].shape[1])
        super().commit()
        self._take_up(leaving)

    def _leaving(self, num_tokens: int) -> list[tuple[list[int], KeyValue]]:
        """Copies of the frames that so many new tokens push out, those together that go into the sink together, in the
        order of its slots."""
        sink_size, runs = self.state.slots.sink_size, []
        frames = self.state.leaving(num_tokens // self.state.frame_tokens)
        for _, run in groupby(frames, lambda frame: frame // sink_size):
            run = list(run)[::-1]  # slot 0 is the rightmost one
            runs.append((run, tuple(torch.cat(x, dim=1) for x in zip(*map(self._frame, run)))))
        return runs

    def _frame(self, frame: int) -> KeyValue:
        """Of one that is still in its slot, or is about to be stored."""
        state = self.state
        stored = state.num_frames - state.first_frame
        if frame < stored:
            tokens = state.tokens(state.slots.slot(frame))
            return self.key[:, tokens], self.value[:, tokens]
        tokens = slice((frame - stored) * state.frame_tokens, (frame - stored + 1) * state.frame_tokens)
        return tuple(x[:, tokens] for x in self._stored)

    def _take_up(self, leaving: list[tuple[list[int], KeyValue]]):
        if not leaving:
            return
        state, ema = self.state, self.state.ema
        start = state.end - ema.sink_size * state.frame_tokens
        slots = self.key[:, start : state.end], self.value[:, start : state.end]
        if self._sink_value is None:
            # Nothing has moved the sink yet: it does not before something has left.
            self._sink_key, self._sink_value = (x.to(ema.dtype(x), copy=True) for x in slots)
        sink = self._sink_key, self._sink_value
        for run, frames in leaving:
            left, right = (state.tokens(frame % ema.sink_size) for frame in (run[0], run[-1]))
            own = slice(left.start - start, right.stop - start)
            blended = ema.blend(tuple(x[:, own] for x in sink), frames, ema.rotation_back(run[0] // ema.sink_size))
            for x, new in zip(sink, blended):
                x[:, own] = new
        for slot, x in zip(slots, sink):
            slot.copy_(x)
        self._sink_shift = 0


class EMASinkKVCache(CausalWanKVCache):
    """
    A [`CausalWanKVCache`] whose sink takes up the frames that leave the window, by a [`SinkEMA`]; a model that has
    `sink_ema` in its config makes it.

    After a [`~CausalWanKVCache.rewind`] that keeps it the sink is what it was, all that it has taken up included, and
    takes up nothing of what is written anew a second time. Without, it is built of the frames that are written next.
    """

    # Each video's sink takes up that video's frames.
    shares_past = False

    def __init__(self, num_layers: int, ema: SinkEMA, max_frames: int | None = None, past_weight: float = 1.0):
        super().__init__(0, max_frames, past_weight)
        self.state = EMASinkState(ema=ema)
        self.layer_caches = [EMASinkKVLayerCache(self.state) for _ in range(num_layers)]

    def _moving_sink(self, config) -> int:
        return config.sink_size
