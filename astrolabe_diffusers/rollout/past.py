"""What lies before the window that is scored and trained (streaming long tuning, Astrolabe 3.2 and 3.3)."""

from dataclasses import dataclass

import torch

from ..errors import UserError
from .seeds import seeded_generator


@dataclass(frozen=True)
class Past:
    """`num_frames` latent frames before the window; if `shared`, the videos of a batch, of one group, have one."""

    num_frames: int = 0
    shared: bool = False

    def rows(self, videos: torch.Tensor) -> torch.Tensor:
        """Of what is one a video `(B, ...)` as many as there are pasts."""
        return videos[:1] if self.shared else videos


@dataclass
class Windows:
    """Which window of a long video an epoch trains: its `size`, and where it `starts`, in latent frames. With
    `shared_past` the videos of a group part only there."""

    size: int
    starts: list[int]
    seed: int
    shared_past: bool = False

    @property
    def have_past(self) -> bool:
        """Whether something lies before one of them."""
        return max(self.starts) > 0

    def past(self, epoch: int) -> Past:
        """What is before it in this epoch, on every process."""
        index = torch.randint(len(self.starts), (), generator=seeded_generator("window", self.seed, epoch))
        return Past(self.starts[index], self.shared_past)


def make_windows(config, num_frames: int, block_frames: int, sink_size: int) -> Windows:
    """The windows of an [`OnlineConfig`], of videos of `num_frames` latent frames unless it has `sample_frames`; a
    [`UserError`] if window, video or starts are no whole blocks or do not fit into each other."""
    total = config.sample_frames or num_frames
    size = config.window_size or num_frames
    for name, value in (("sample_frames", total), ("window_size", size)):
        if value % block_frames:
            raise UserError(f"{name}={value} is no whole number of blocks of {block_frames} latent frames.")
    if size > total:
        raise UserError(f"window_size={size} is longer than the video, {total} latent frames: raise sample_frames.")
    last = total - size
    everywhere = list(range(0, last + 1, block_frames))
    if config.window_selection == "choices":
        starts = config.window_choices
        wrong = [start for start in starts if start not in everywhere]
        if wrong or not starts:
            raise UserError(
                f"window_choices {wrong or starts}: a window may begin at 0, {block_frames}, ... {last} latent frames."
            )
    else:
        starts = {"random": everywhere, "first": [0], "last": [last]}[config.window_selection]
    if config.shared_past:
        # At 0 there is no past, and less than the sink cannot be shared.
        starts = [start for start in starts if start >= max(sink_size, 1)]
        if not starts:
            raise UserError(
                f"shared_past: no window begins after the model's sink of {sink_size} latent frames; raise "
                "sample_frames, or choose another window_selection."
            )
    return Windows(size, starts, config.seed, config.shared_past)
