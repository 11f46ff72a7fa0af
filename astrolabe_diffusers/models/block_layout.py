"""What blocks see in a pass over several of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .kv_cache import KeyValue
from .kv_cache_ema_sink import SinkEMA
from .rotary import Rotary, apply_rotary


@dataclass
class BlockLayout:
    """Which earlier frames each block sees: everything, or the sink and a window that ends with the block itself.

    A block of frames `[start, end)` sees frames `0 .. sink_size-1` and `end-(attn_window-sink_size) .. end-1`; while
    `end <= attn_window`, and always with `attn_window=-1`, that is all of `0 .. end-1`.
    """

    frame_tokens: int
    block_frames: int
    attn_window: int
    sink_size: int
    sink_shifts: list[Rotary | None]  # relative positions: rotation of the sink keys for each block of the pass
    first_frame: int = 0  # of the pass, in the clip
    ema: SinkEMA | None = None  # the sink takes up the units that leave the window
    num_taken: int = 0  # units of the clip that are in the sink before the pass, its own included
    # Frames in the largest pieces of which every block and every context is a whole number.
    unit: int = field(init=False)
    # By which units turn back to the sink, by lap of `sink_size` frames; of those that the pass may take up.
    rotations_back: list[Rotary | None] = field(init=False)

    def __post_init__(self):
        # Here, for torch.compile cannot take gcd of numbers that differ between models.
        ring = 0 if self.attn_window == -1 else self.attn_window - self.sink_size
        self.unit = math.gcd(self.block_frames, self.sink_size, ring)
        if self.ema is not None:
            self.num_taken = max(self.num_taken, self.sink_units)
            first = self.num_taken // self.sink_units
            last = self.taken_before(self.first_frame + len(self.sink_shifts) * self.block_frames) // self.sink_units
            self.rotations_back = [None] * first + [self.ema.rotation_back(lap) for lap in range(first, last + 1)]

    @property
    def sink_units(self) -> int:
        return self.sink_size // self.unit

    def context(self, start: int, end: int) -> list[tuple[int, int]]:
        """Frame ranges before `start` that the block `[start, end)` sees, the sink first."""
        if self.attn_window == -1 or end <= self.attn_window:
            return [(0, start)] if start else []
        first = end - (self.attn_window - self.sink_size)
        return [r for r in [(0, self.sink_size), (first, start)] if r[0] < r[1]]

    def units(self, ranges: list[tuple[int, int]]) -> list[int]:
        """The numbers of the units in frame ranges, counted from frame 0."""
        return [i for a, b in ranges for i in range(a // self.unit, b // self.unit)]

    def taken_before(self, end: int) -> int:
        """How many units are in the sink that the block `[start, end)` sees if the sink takes up what leaves."""
        return max(end - (self.attn_window - self.sink_size), self.sink_size) // self.unit

    def take_up(
        self, sink: list[KeyValue], keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], units: range
    ):
        """Into `sink`, its units, those of the clip with these numbers; `keys` and `values` are of all its units."""
        for i in units:
            place, rotation = i % self.sink_units, self.rotations_back[i // self.sink_units]
            sink[place] = self.ema.blend(sink[place], (keys[i], values[i]), rotation)

    def sinks(
        self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
    ) -> list[tuple[list[torch.Tensor], list[torch.Tensor]] | None]:
        """Keys and values of the sink's units as each block of the pass sees them, of those of the clip's units;
        `None` where it sees the clip's."""
        sink, taken, sinks = list(zip(keys[: self.sink_units], values)), self.num_taken, []
        for block, shift in enumerate(self.sink_shifts, start=1):
            end = self.first_frame + block * self.block_frames
            if self.ema is not None:
                before = self.taken_before(end)
                self.take_up(sink, keys, values, range(taken, before))
                taken = before
            if shift is None and (self.ema is None or end <= self.attn_window):
                sinks.append(None)
                continue
            placed = [key if shift is None else apply_rotary(key, shift) for key, _ in sink]
            # What it has taken up it may keep in float32.
            sinks.append(([key.type_as(keys[-1]) for key in placed], [value.type_as(values[-1]) for _, value in sink]))
        return sinks
