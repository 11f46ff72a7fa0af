"""What blocks see in a pass over several of them."""

import math
from dataclasses import dataclass, field

from .rotary import Rotary


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
    # Frames in the largest pieces of which every block and every context is a whole number.
    unit: int = field(init=False)

    def __post_init__(self):
        # Here, for torch.compile cannot take gcd of numbers that differ between models.
        ring = 0 if self.attn_window == -1 else self.attn_window - self.sink_size
        self.unit = math.gcd(self.block_frames, self.sink_size, ring)

    def context(self, start: int, end: int) -> list[tuple[int, int]]:
        """Frame ranges before `start` that the block `[start, end)` sees, the sink first."""
        if self.attn_window == -1 or end <= self.attn_window:
            return [(0, start)] if start else []
        first = end - (self.attn_window - self.sink_size)
        return [r for r in [(0, self.sink_size), (first, start)] if r[0] < r[1]]

    def units(self, ranges: list[tuple[int, int]]) -> list[int]:
        """The numbers of the units in frame ranges, counted from frame 0."""
        return [i for a, b in ranges for i in range(a // self.unit, b // self.unit)]
