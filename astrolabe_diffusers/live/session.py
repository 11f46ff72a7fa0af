"""One viewer's video: made block by block, steered while it is made, and made again of what was written down."""

import json
import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from ..models.lora_layers import adapter_weights
from .model import MAX_SEED, LiveModel, check_prompt, check_whole_number
from .pacing import Pacing
from .record import make_record, session_arguments
from .start_file import StartFile


# Of a frame, in pixels: WebP's bound; x264's is one more.
MAX_SIDE = 16_383
MAX_EVENTS = 10_000
# Of all events of a session, as JSON: they and the file that it starts from are to fit into `MAX_SESSION_BYTES`.
MAX_EVENT_BYTES = 2**22


@dataclass
class Block:
    """Frames `(F, H, W, 3)`, uint8, of block `number` of a lane."""

    lane: int
    number: int
    first_frame: int
    frames: np.ndarray
    seconds: float  # that it took
    memory_gb: float  # of the GPU, in use; of the process on a CPU
    # From one block of the session to its next, all lanes, if nobody pauses: with those of others in between. The
    # engine knows.
    turn_seconds: float = 0.0


@dataclass
class Mark:
    """A change took hold: `block` is the first one made with it, and was ready `seconds` after it was asked for."""

    event: dict[str, Any]
    sent_after_block: int
    block: int
    seconds: float
    id: int | None = None  # that it came with; of those that were made one, the last one's


@dataclass
class Pending:
    """A change that the next block takes up."""

    event: dict[str, Any]
    after_block: int
    arrived: float
    size: int = 0  # of the event, as JSON
    id: int | None = None


@dataclass(eq=False)
class LiveSession:
    """
    A video of a [`LiveModel`] that is steered while it is made. [`~LiveSession.make_block`] and
    [`~LiveSession.close`] are for the thread that makes blocks, all else may be called from any.

    Args:
        prompt, seed: with the events they decide all frames.
        height, width: in pixels; the model's own by default.
        compare: two lanes from the same noise, 0 without the LoRAs and 1 with them; else lane 0 has them.
        start_file: that all lanes start from, as `image` or `video` of the pipeline. It is decoded here and now.
        strength: in (0, 1], of the pipeline: the video is made anew, and ends with the frames that are given.
        events: of an earlier session, each with the `block` it is for; they come as they came there.
        without: LoRAs whose weight is 0 at first.

    Raises:
        ValueError: an argument that is none of these.
    """

    model: LiveModel
    prompt: str
    seed: int
    height: int | None = None
    width: int | None = None
    compare: bool = False
    events: Sequence[dict[str, Any]] = ()
    start_file: StartFile | None = None
    strength: float | None = None
    without: Sequence[str] = ()
    num_blocks: int = field(default=0, init=False)  # made
    paused: bool = field(default=False, init=False)
    holders: set[Any] = field(default_factory=set, init=False)  # what takes every frame, recordings, and is behind
    begins_at: float = field(default=0.0, init=False)  # by `time.monotonic`: nothing is shown sooner; the engine knows

    def __post_init__(self):
        pipe = self.model.pipe
        self.height = pipe.config.height if self.height is None else self.height
        self.width = pipe.config.width if self.width is None else self.width
        check_whole_number("seed", self.seed, MAX_SEED)
        pipe.check_size(self.height, self.width)
        if self.height * self.width > self.model.max_pixels:
            raise ValueError(f"{self.height}x{self.width} are more than {self.model.max_pixels} pixels.")
        if max(self.height, self.width) > MAX_SIDE:
            raise ValueError(f"height and width must be at most {MAX_SIDE}, not {self.height} and {self.width}.")
        number = self._check_start()
        self._length = self.model.num_frames if self.strength is None else number
        pipe.check_inputs(check_prompt(self.prompt), self.height, self.width, self._length)
        if not isinstance(self.compare, bool) or (self.compare and not self.model.adapters):
            raise ValueError("compare must be true or false, and true only with a LoRA.")
        self.weights = self.model.weights | dict.fromkeys(self.without, 0.0)
        if without := self.weights if self.compare else self.without:
            self.model.check_event({"type": "lora", "weights": dict.fromkeys(without, 0.0)})
        self._schedule = self._check_events(self.events)
        self._num_events = len(self.events) + bool(self.weights)
        self._event_bytes = len(json.dumps(self._schedule))
        self._taken: list[dict[str, Any]] = []
        if self.weights:
            self._taken.append({"block": 0, "type": "lora", "weights": dict(self.weights)})
        self._lock = threading.Lock()
        self._pending: list[Pending] = []
        self._streams = None
        self.active_at = time.monotonic()
        self.pacing = Pacing(self.model, 1 + self.compare, self._length, self.active_at)
        self._start = self._decode_start(number)

    def _check_start(self) -> int:
        """How many frames are given."""
        number = isinstance(self.strength, (int, float)) and not isinstance(self.strength, bool)
        if self.strength is not None and not (
            number and 0 < self.strength <= 1 and self.start_file and not self.start_file.is_picture
        ):
            raise ValueError("strength must be a number above 0 and at most 1, and needs a video to start from.")
        return self.model.num_start_frames(self.start_file, self.strength) if self.start_file else 0

    def _decode_start(self, number: int) -> dict[str, Any]:
        """The arguments of the pipeline, for which it has nothing left to resize."""
        if self.start_file is None:
            return {}
        resize = partial(self.model.pipe.video_processor.resize, height=self.height, width=self.width)
        frames = self.start_file.frames(number, resize)
        return {"image": frames[0]} if self.start_file.is_picture else {"video": frames, "strength": self.strength}

    def _check_events(self, events: Any) -> dict[int, list[dict[str, Any]]]:
        if not isinstance(events, (list, tuple)) or len(events) > MAX_EVENTS:
            raise ValueError(f"events must be a list of at most {MAX_EVENTS}.")
        schedule: dict[int, list[dict[str, Any]]] = {}
        for event in events:
            checked = self.model.check_event(event)
            check_whole_number("block of an event", event.get("block"), MAX_SEED)
            schedule.setdefault(event["block"], []).append(checked)
        return schedule

    # Steering

    def send(self, event: dict[str, Any]):
        """A change that holds from the next block on: `{"type": "prompt", "prompt", "transition", "num_blocks"}` or
        `{"type": "lora", "weights": {name: weight}}`. Of several prompts before one block the last counts. With an
        `id`, a whole number, its [`Mark`] has it.

        Raises:
            ValueError: it is neither, or the session could not be saved and replayed with one more.
        """
        checked, id = self.model.check_event(event), event.get("id")
        if id is not None:
            check_whole_number("id", id, MAX_SEED)
        with self._lock:
            now = time.monotonic()
            same = [p for p in self._pending if p.event["type"] == checked["type"]]
            if same and checked["type"] == "lora":
                checked["weights"] = same[0].event["weights"] | checked["weights"]
            size = len(json.dumps(checked))
            number = self._num_events + 1 - len(same)
            total = self._event_bytes + size - sum(p.size for p in same)
            if number > MAX_EVENTS or total > MAX_EVENT_BYTES:
                raise ValueError("this video has had as many changes as can be saved: restart it.")
            self._num_events, self._event_bytes = number, total
            # Nobody can fill the memory with what no block has taken up yet.
            self._pending = [p for p in self._pending if p not in same]
            self._pending.append(Pending(checked, self.num_blocks - 1, now, size, id))
            self.active_at = now

    def pause(self, paused: bool = True):
        with self._lock:
            self.paused = paused
            if paused:
                self.pacing.pause()
            self.active_at = time.monotonic()

    def hold(self, holder: Any, held: bool):
        """`holder` takes every frame and is behind, or is not any more."""
        with self._lock:
            (self.holders.add if held else self.holders.discard)(holder)

    def sent(self, frame: int):
        """The first picture of a block, of this frame, is on its way; in the last lane, if there are two."""
        with self._lock:
            self.pacing.sent(frame, time.monotonic())

    def show(self, frame: int):
        """The viewer has seen the video up to this frame. One that was not made is of a video before this one.

        Raises:
            ValueError: it is no number of a frame.
        """
        check_whole_number("frame", frame, MAX_SEED)
        with self._lock:
            now = time.monotonic()
            if self.pacing.show(frame, now):
                self.active_at = now

    def due_at(self, turn_seconds: float) -> float:
        """When the next block is to be made, as [`Pacing.due_at`] has it; never while it is paused, or a recording is
        behind."""
        with self._lock:
            return math.inf if self.paused or self.holders else self.pacing.due_at(turn_seconds)

    def start_delay(self, turn_seconds: float, first_seconds: float = 0.0) -> float:
        """As [`Pacing.start_delay`] has it."""
        return self.pacing.start_delay(turn_seconds, first_seconds)

    @property
    def block_seconds(self) -> float:
        """As [`Pacing.block_seconds`] has it."""
        return self.pacing.block_seconds

    @property
    def num_frames(self) -> int:
        """That were made."""
        return self.pacing.num_frames

    @property
    def ready_at(self) -> float:
        """When the last block was made, by `time.monotonic`."""
        return self.pacing.ready_at

    # Making

    def make_block(self) -> tuple[list[Block], list[Mark]]:
        """
        The next block, of each lane, and what took hold with it.

        Raises:
            StopIteration: the video has come to its end.
            FloatingPointError: a block is not finite.
        """
        began = time.monotonic()
        if self._streams is None:
            self._streams = [self._open() for _ in range(1 + self.compare)]
            self._start = {}
        with self._lock:
            pending, self._pending = self._pending, []
        number = self.num_blocks
        replayed = [Pending(event, number - 1, began) for event in self._schedule.pop(number, [])]
        taken = self._take_up(number, replayed + pending)
        blocks = []
        for lane, stream in enumerate(self._streams):
            without = self.compare and lane == 0
            weights = {name: 0.0 if without else self.weights[lora] for lora, name in self.model.adapters.items()}
            started = time.monotonic()
            with ExitStack() as stack:
                for expert in self.model.pipe.experts.values():
                    stack.enter_context(adapter_weights(expert, weights))
                frames = next(stream)[0].cpu().numpy()
            seconds = time.monotonic() - started
            blocks.append(Block(lane, number, self.num_frames, frames, seconds, self.model.memory_gb()))
        with self._lock:
            ready = self.active_at = time.monotonic()
            self.num_blocks += 1
            self.pacing.made(len(frames), ready - began, ready)
        return blocks, [Mark(p.event, p.after_block, number, ready - p.arrived, p.id) for p in taken]

    def _open(self):
        return self.model.pipe.stream(
            self.prompt,
            height=self.height,
            width=self.width,
            num_frames=self._length,
            # On the CPU: the same random numbers on every device.
            generator=torch.Generator().manual_seed(self.seed),
            output_type="uint8",
            **self._start,
            **self.model.stream_settings,
        )

    def _take_up(self, number: int, pending: list[Pending]) -> list[Pending]:
        prompts = [p for p in pending if p.event["type"] == "prompt"][-1:]
        loras = [p for p in pending if p.event["type"] == "lora"]
        for change in prompts:
            arguments = {name: value for name, value in change.event.items() if name != "type"}
            for stream in self._streams:
                stream.set_prompt(**arguments)
        for change in loras:
            self.weights |= change.event["weights"]
        with self._lock:
            # At first they say what the weights are, and then what changes.
            if loras and number == 0:
                self._taken[0]["weights"] = dict(self.weights)
            elif loras:
                changed = {name: weight for p in loras for name, weight in p.event["weights"].items()}
                self._taken.append({"block": number, "type": "lora", "weights": changed})
            self._taken += [{"block": number, **change.event} for change in prompts]
        return prompts + loras

    def close(self):
        """Ends the video and frees its memory."""
        for stream in self._streams or ():
            stream.close()
        self._streams = []
        self._start = {}

    def record(self) -> dict[str, Any]:
        """The session as JSON values: [`replay`] makes the same frames of it."""
        with self._lock:
            return make_record(
                self.model,
                prompt=self.prompt,
                seed=self.seed,
                height=self.height,
                width=self.width,
                compare=self.compare,
                start_file=self.start_file,
                strength=self.strength,
                num_blocks=self.num_blocks,
                events=self._taken,
            )


def replay(model: LiveModel, record: dict[str, Any]) -> Iterator[list[Block]]:
    """
    Makes the blocks of [`LiveSession.record`] again, of all lanes. On a CPU the frames are the same, bit for bit.

    Raises:
        ValueError: it is no session, or of other weights.
    """
    session = LiveSession(model, **session_arguments(model, record))
    try:
        for number in range(record["num_blocks"]):
            try:
                blocks, _ = session.make_block()
            except StopIteration:
                raise ValueError(f"it has {record['num_blocks']} blocks, and its video only {number}.") from None
            yield blocks
    finally:
        session.close()
