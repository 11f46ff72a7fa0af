"""What lies before the window that is scored and trained (streaming long tuning, Astrolabe 3.2 and 3.3)."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from ..errors import UserError
from .seeds import seeded_generator


T = TypeVar("T")


@dataclass(frozen=True)
class Switch:
    """Where videos go on with another prompt: from latent frame `frame` on. The others as in
    [`CausalWanStream.set_prompt`]."""

    frame: int = 0
    transition: str = "roll"
    num_blocks: int = 1
    global_sink: bool = True


@dataclass(frozen=True)
class Past:
    """`num_frames` latent frames before the window; if `shared`, the videos of a batch, of one group, have one. The
    `switch` is in it, or where it ends."""

    num_frames: int = 0
    shared: bool = False
    switch: Switch | None = None

    def rows(self, videos: torch.Tensor) -> torch.Tensor:
        """Of what is one a video `(B, ...)` as many as there are pasts."""
        return videos[:1] if self.shared else videos


@dataclass
class Windows:
    """Which window of a long video an epoch trains: its `size`, and where it `starts`, in latent frames. With
    `shared_past` the videos of a group part only there. By one of `switches`, whose `frame` is that before the window,
    not more than 0, they come to the prompt that they have in it."""

    size: int
    starts: list[int]
    seed: int
    shared_past: bool = False
    switches: list[Switch] = field(default_factory=list)

    @property
    def have_past(self) -> bool:
        """Whether something lies before one of them."""
        return max(self.starts) > 0

    def past(self, epoch: int) -> Past:
        """What is before it in this epoch, on every process."""
        start = _draw(self.starts, "window", self.seed, epoch)
        if not self.switches:
            return Past(start, self.shared_past)
        possible = [switch for switch in self.switches if start + switch.frame > 0]
        return self._past(start, _draw(possible, "switch", self.seed, epoch))

    @property
    def largest(self) -> Past:
        """The past of the videos that take most memory."""
        # A recache is a pass over all that the window has.
        switches = sorted(self.switches, key=lambda switch: switch.transition == "recache")
        return self._past(max(self.starts), switches[-1] if switches else None)

    def _past(self, start: int, switch: Switch | None) -> Past:
        return Past(start, self.shared_past, switch and replace(switch, frame=start + switch.frame))


def _draw(items: Sequence[T], *key: int | str) -> T:
    return items[torch.randint(len(items), (), generator=seeded_generator(*key))]


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
    switches = make_switches(config, block_frames)
    if switches:
        starts = [start for start in starts if any(start + switch.frame > 0 for switch in switches)]
        if not starts:
            raise UserError(
                "transitions: no window begins after a block with the old prompt; raise sample_frames, or choose "
                "another window_selection or smaller switch_distances."
            )
    return Windows(size, starts, config.seed, config.shared_past, switches)


def make_switches(config, block_frames: int) -> list[Switch]:
    """Those of an [`OnlineConfig`], each with every distance from the window."""
    switches = []
    for transition in config.transitions:
        num_blocks = config.transition_blocks if transition == "roll" else 1
        for distance in config.switch_distances:
            switches.append(Switch(-distance * block_frames, transition, num_blocks, config.recache_sink))
    return switches
