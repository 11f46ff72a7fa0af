"""What a K/V cache keeps when a scene ends, and how far from it the next one begins (Infinity-RoPE, arXiv 2511.20649).
"""

from dataclasses import dataclass

import torch


# Both as in Infinity-RoPE's code: a flush keeps one frame and the newest two, which are rows 0 to 2 of the temporal
# positions, and the first block after a cut begins with row 45. Its model is trained on 21 frames: it has never seen
# one as far away. With absolute positions the block moves as far beyond its own rows; fixed ones would be among those
# of a longer video.
NUM_NEWEST = 2
CUT_ROW = 45


@dataclass
class FlushedKeys:
    """Of one layer, `(batch, tokens, heads, head_dim)`.

    Attributes:
        first: of the oldest frame, as they were stored. In its slot they may be those of a later place.
        in_place: of all frames that were kept, as long as those in the slots are seen from afar.
    """

    first: torch.Tensor
    in_place: torch.Tensor | None = None

    def select(self, videos: list[int]) -> "FlushedKeys":
        return FlushedKeys(self.first[videos], None if self.in_place is None else self.in_place[videos])


def kept_frames(num_frames: int, capacity: int, sink_size: int) -> list[int]:
    """Of frames `0 .. num_frames-1`, for which a window has so many slots: the oldest that the next block would see
    and the newest two, in this order; fewer where it sees fewer."""
    ring = capacity - sink_size
    some_left = num_frames > capacity
    oldest = num_frames - ring if some_left and sink_size == 0 else 0
    num_newest = min(NUM_NEWEST, ring) if some_left else NUM_NEWEST
    return [oldest, *range(max(oldest + 1, num_frames - num_newest), num_frames)]
