"""Calls of the pipeline: where each of them is, and what it returns, whole videos or some that are still generated."""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput

from .scene_prompt import TRANSITIONS, Scene, check_transition, parse_scenes


@dataclass(eq=False)
class Call:
    """Where a call of the pipeline is, and whether it is to end."""

    interrupt: bool = False  # the current block ends with this step and the video with this block
    block: int | None = None  # index of the block being generated
    timestep: torch.Tensor | None = None  # of the step being made, `None` between blocks
    num_timesteps: int | None = None  # steps of the block


class Calls:
    """The calls of one pipeline that are under way, and which of them each thread is in."""

    def __init__(self):
        self._lock = threading.Lock()
        self._under_way: weakref.WeakSet[Call] = weakref.WeakSet()
        self._thread = threading.local()
        self._latest = Call()

    def __reduce__(self):
        # A copy of a pipeline has none of its calls.
        return Calls, ()

    def begin(self) -> Call:
        """A new call, under way from now on."""
        call = Call()
        with self._lock:
            self._under_way.add(call)
        return call

    @contextmanager
    def run(self, call: Call) -> Iterator[None]:
        """Inside, this thread is in `call`. A callback may run another one."""
        outer = self._running
        self._thread.call = self._latest = call
        try:
            yield
        finally:
            self._thread.call = outer

    @property
    def _running(self) -> Call | None:
        return getattr(self._thread, "call", None)

    @property
    def current(self) -> Call:
        """The call that this thread is in; outside of all of them the one that made the latest block."""
        return self._running or self._latest

    def set_interrupt(self, interrupt: bool):
        """Of the call that this thread is in; outside of all of them, of every call that is under way."""
        with self._lock:
            for call in [self._running] if self._running else list(self._under_way):
                call.interrupt = interrupt


@dataclass
class CausalWanPipelineOutput(BaseOutput):
    """
    The videos, by `output_type`: `"np"` an array `(B, F, H, W, 3)` in [0, 1], `"pt"` a tensor `(B, F, 3, H, W)` in
    [0, 1], `"pil"` a list of lists of images, `"uint8"` a tensor `(B, F, H, W, 3)` of 0 to 255 on the device, as
    encoders of video take it, `"latent"` the normalised latents `(B, C, f, h, w)`.
    """

    frames: torch.Tensor | np.ndarray | list[list[PIL.Image.Image]]


@dataclass
class PromptSwitch:
    """What `set_prompt` asks for; see there."""

    scenes: list[list[Scene]]  # of each video
    transition: str
    num_blocks: int
    global_sink: bool

    @classmethod
    def parse(
        cls,
        prompt: str | list[str],
        transition: str = "roll",
        num_blocks: int = 1,
        global_sink: bool = True,
        batch_size: int = 1,
        transitions: Sequence[str] = TRANSITIONS,
    ) -> "PromptSwitch":
        """Of the arguments of `set_prompt`, whose errors it raises; `transitions` are those of the pipeline."""
        check_transition(transition, transitions)
        if not isinstance(num_blocks, Integral) or num_blocks < 1 or (num_blocks > 1 and transition != "roll"):
            raise ValueError(
                f"`num_blocks={num_blocks}`: a whole number of at least 1, and more than 1 only with "
                "transition='roll'."
            )
        if not global_sink and transition != "recache":
            raise ValueError("`global_sink=False` only with transition='recache'.")
        if isinstance(prompt, list) and len(prompt) != batch_size:
            raise ValueError(f"{len(prompt)} prompts for {batch_size} videos: pass one, or one a video.")
        texts = prompt if isinstance(prompt, list) else [prompt] * batch_size
        scenes = [parse_scenes(text) for text in texts]
        for scene in sum(scenes, []):
            check_transition(scene.transition, transitions)
        return cls(scenes, transition, num_blocks, global_sink)


class CausalWanStream(Iterator, AbstractContextManager):
    """
    What `CausalWanPipeline.stream` returns: an iterator over the frames of each block.

    Nothing is computed until the next block is asked for: to pause, ask later. `close()` ends the stream and frees its
    memory at once, as leaving a `with` block does. Several threads may ask: each block goes to one of them.
    """

    def __init__(
        self,
        blocks: Iterator[torch.Tensor | np.ndarray | list],
        inbox: deque[PromptSwitch],
        batch_size: int,
        running: Callable[[], AbstractContextManager],
        transitions: Sequence[str] | None,
    ):
        # What runs does not know the stream: a cycle would keep the cache until the garbage collector comes by.
        self._blocks = blocks
        self._inbox = inbox  # has room for the newest change of the prompt, for the thread that generates
        self._batch_size = batch_size
        self._running = running  # the context in which a block is made
        self._transitions = transitions  # of the pipeline, if that has a text encoder
        self._lock = threading.RLock()

    def __next__(self) -> torch.Tensor | np.ndarray | list:
        with self._lock, self._running():
            return next(self._blocks)

    def __exit__(self, *_):
        self.close()

    def close(self):
        with self._lock:
            self._blocks.close()

    def set_prompt(
        self, prompt: str | list[str], transition: str = "roll", num_blocks: int = 1, global_sink: bool = True
    ):
        """
        Go on with another prompt from the next block on. May be called from any thread; of several calls between two
        blocks the last one counts. Scenes that were still to come are dropped; the prompt may have its own.

        Args:
            prompt (`str` or `list[str]`): one for all videos, or one a video.
            transition (`str`):
                `"roll"`: only the text changes, the frames in memory stay as they are. `"recache"`: they are encoded
                anew with the new prompt, so that it takes effect faster (LongLive). `"flush"`: all but the first and
                the newest two are forgotten (Infinity-RoPE, [`CausalWanKVCache.flush`]). `"rope_cut"`: as well, and
                the first block sees them from afar, as a scene of its own. `"cut"`: all are forgotten.
            num_blocks (`int`):
                With `"roll"`, the blocks over which the text embeddings go from the old prompt to the new, both
                included: of two or more the first still has the old one, as in Krea's server. One changes at once.
            global_sink (`bool`):
                With `"recache"`, whether the sink keeps the first frames of the video, as made with their prompt.

        Raises:
            ValueError: an argument that is none of these, or that this transition does not use; a transition that the
                pipeline does not have ([`CausalWanPipeline.transitions`]), or no text encoder.
        """
        if self._transitions is None:
            raise ValueError("this pipeline has no text encoder: give scenes as `prompt_embeds` from the start.")
        switch = PromptSwitch.parse(
            prompt, transition, num_blocks, global_sink, self._batch_size, self._transitions
        )
        self._inbox.append(switch)
