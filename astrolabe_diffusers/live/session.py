"""One viewer's video: made block by block, steered while it is made, and written down so that it can be made again."""

import json
import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch

from ..errors import close_matches
from ..files.text import parse_json
from ..models.lora_layers import adapter_weights, dora_adapters
from ..pipelines.block_generation import NOISE_LAYOUT
from ..pipelines.loading import base_digest, frame_configs, lora_digest
from ..pipelines.pipeline_causal_wan import CausalWanPipeline
from ..pipelines.scene_prompt import parse_scenes
from ..pipelines.stream import PromptSwitch
from ..shareable import shareable_value
from .start_file import StartFile, available_media


# Of the JSON of a session.
VERSION = 1
# JavaScript's whole numbers end there.
MAX_SEED = 2**53 - 1
MAX_PROMPT = 4096
# Of a frame, in pixels: WebP's bound; x264's is one more.
MAX_SIDE = 16_383
# Texts are in memory from the time at which they are asked for.
MAX_SCENES = MAX_TRANSITION_BLOCKS = 32
MAX_WEIGHT = 100
MAX_EVENTS = 10_000
# Of all events of a session, as JSON: it and its file are to fit into what a server takes.
MAX_EVENT_BYTES = 2**22
MAX_SESSION_BYTES = 2**24
# What changes frames beside the weights, and what it is if nobody says so. Sessions have it.
FRAME_SETTINGS = {"max_sequence_length": None, "vae_tiling": False, "attention_backend": None, "compile": False}
# What a block may take longer than the slowest of the last ones, on its way too.
_SLACK = 0.15
# So long before it is due the first picture of a block is to be on its way at the latest.
_SPARE = 0.05
# What remains of more than that after a block that was in time.
_CALM = 0.97
_RECENT = 8


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


class LiveModel:
    """
    A pipeline on its device, and what its sessions have to know of it.

    Args:
        pipe: with its LoRAs loaded by [`load_loras`].
        name: of the model, as it is shown and stored.
        loras: paths or Hub ids and their weights, in the order in which they were loaded.
        num_frames: after which a video ends. By default never, or with the model's own number if it cannot go on.
        max_pixels: of a frame; by default as many as the model's own size has.
        max_sequence_length: of its prompts, in tokens; the pipeline's own by default.
        settings: further ones that `pipe` was made with and that change frames, by their names in [`PipelineConfig`].
    """

    def __init__(
        self,
        pipe: CausalWanPipeline,
        name: str,
        loras: Mapping[str, float] | None = None,
        num_frames: int | None = None,
        max_pixels: int | None = None,
        max_sequence_length: int | None = None,
        **settings: Any,
    ):
        self.pipe = pipe
        self.name = name
        self.weights = shareable_value(dict(loras or {}))
        self.adapters = {lora: f"lora_{i}" for i, lora in enumerate(self.weights)}
        # Now, for it looks at every layer: viewers send thousands of weights.
        doras = dora_adapters(pipe.denoiser)
        self.doras = {lora for lora, name in self.adapters.items() if name in doras}
        self.num_frames = num_frames or (math.inf if pipe.is_endless else pipe.config.num_frames)
        self.num_frames = pipe.round_num_frames(self.num_frames)
        pipe.check_inputs("", pipe.config.height, pipe.config.width, self.num_frames)
        self.max_pixels = max_pixels or pipe.config.height * pipe.config.width
        length = max_sequence_length or pipe.config.max_sequence_length
        self.stream_settings = {"max_sequence_length": length}
        self.settings = FRAME_SETTINGS | settings | self.stream_settings
        self.digest = base_digest(pipe)
        self.configs = frame_configs(pipe)
        self.block_seconds = 0.0  # of one in the model's own size, if it is warm
        self.lora_digests = {lora: lora_digest(pipe.denoiser, name) for lora, name in self.adapters.items()}

    @property
    def frames_first_block(self) -> int:
        return self.pipe.frames_of_blocks(1)

    @property
    def frames_per_block(self) -> int:
        return self.pipe.frames_of_blocks(2) - self.pipe.frames_of_blocks(1)

    @property
    def frame_rate(self) -> int:
        return self.pipe.config.frame_rate

    @property
    def start_media(self) -> list[str]:
        """Media types of the files that a video may start from; pictures if a block has one latent frame."""
        return available_media(pictures=self.frames_first_block == 1)

    def read_start(self, data: bytes) -> StartFile:
        """A file that videos may start from; a `ValueError` if this model cannot."""
        file = StartFile.read(data)
        self.num_start_frames(file)
        return file

    def num_start_frames(self, file: StartFile, strength: float | None = None) -> int:
        """
        So many of its first frames a video starts from: whole blocks of them.

        Raises:
            ValueError: there is no whole block, or it is a picture and a block has more latent frames than one.
        """
        first, step = self.frames_first_block, self.frames_per_block
        if file.is_picture and first > 1:
            raise ValueError(
                f"a picture is one frame, but the first block of this model has {first}: give a video of {first} "
                "frames or more."
            )
        # Without a strength there has to be a block to make.
        room = min(file.num_frames, self.num_frames - (step if strength is None else 0))
        if room < first:
            raise ValueError(
                f"the first block of this model has {first} frames, and of the file's {file.num_frames} only "
                f"{max(room, 0)} can be given."
            )
        return int(first + (room - first) // step * step)

    def memory_gb(self) -> float:
        # Not where the weights are, which may be offloaded.
        device = self.pipe._execution_device
        if device.type == "cuda":
            return torch.cuda.memory_allocated(device) / 1e9
        return psutil.Process().memory_info().rss / 1e9

    def warm_up(self):
        """Blocks of nobody's until the window is full, three at least, and a new prompt among them: what a process
        does for the first time takes longer."""
        transformer = self.pipe.transformer.config
        session, number = LiveSession(self, "", 0), transformer.local_attn_size // transformer.num_frames_per_block + 1
        with suppress(StopIteration):  # a video may be shorter
            for _ in range(max(number, 3)):
                (block,), _ = session.make_block()
                self.block_seconds = block.seconds
                if block.number == 0:
                    session.send({"type": "prompt", "prompt": "", "transition": self.pipe.transitions[0]})
        session.close()

    def check_event(self, event: Any) -> dict[str, Any]:
        """A prompt or a change of LoRAs with all that it may say; a `ValueError` if it is none."""
        kinds = {"prompt": self._check_prompt, "lora": self._check_lora}
        kind = event.get("type") if isinstance(event, dict) else None
        if not isinstance(kind, str) or kind not in kinds:
            raise ValueError(f"an event is an object whose type is one of {', '.join(kinds)}.")
        return {"type": kind, **kinds[kind](event)}

    def _check_prompt(self, event: dict[str, Any]) -> dict[str, Any]:
        values = {"prompt": check_prompt(event.get("prompt"))}
        values |= {"transition": event.get("transition", "roll"), "num_blocks": event.get("num_blocks", 1)}
        check_whole_number("num_blocks", values["num_blocks"], MAX_TRANSITION_BLOCKS, least=1)
        PromptSwitch.parse(**values, transitions=self.pipe.transitions)
        return values

    def _check_lora(self, event: dict[str, Any]) -> dict[str, Any]:
        weights = event.get("weights")
        if not isinstance(weights, dict) or not weights:
            raise ValueError("weights must be an object of names and numbers.")
        for name, weight in weights.items():
            if name not in self.adapters:
                listed = f"there are {', '.join(self.adapters)}" if self.adapters else "none is loaded"
                raise ValueError(f"there is no LoRA {name!r}{close_matches(name, self.adapters)}; {listed}.")
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if not number or not abs(weight) <= MAX_WEIGHT:
                raise ValueError(f"the weight of a LoRA must be a number from {-MAX_WEIGHT} to {MAX_WEIGHT}.")
            if weight != 1 and name in self.doras:
                raise ValueError(f"{name} is a DoRA, which can only be applied with weight 1.")
        return {"weights": {name: float(weight) for name, weight in weights.items()}}


def check_prompt(prompt: Any) -> str:
    if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT:
        raise ValueError(f"prompt must be text of at most {MAX_PROMPT} characters.")
    if len(parse_scenes(prompt)) > MAX_SCENES:
        raise ValueError(f"prompt must have at most {MAX_SCENES} scenes.")
    return prompt


def check_whole_number(name: str, value: Any, most: int, least: int = 0):
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}.")


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
    num_frames: int = field(default=0, init=False)  # made
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
        # Of the flow: ends of blocks, what was shown of them and when, and how long blocks took.
        self._last_frames: deque[int] = deque(maxlen=4)
        self._shown, self._shown_at = -1, None
        self._sent_at = -math.inf  # the newest block
        self.ready_at = self.active_at = time.monotonic()
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._slack = _SLACK
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
            self._shown_at = None if paused else self._shown_at
            self.active_at = time.monotonic()

    def hold(self, holder: Any, held: bool):
        """`holder` takes every frame and is behind, or is not any more."""
        with self._lock:
            (self.holders.add if held else self.holders.discard)(holder)

    def sent(self, frame: int):
        """The first picture of a block, of this frame, is on its way; in the last lane, if there are two."""
        with self._lock:
            now = self._sent_at = time.monotonic()
            if self._shown_at is not None:
                spare = self._shown_at + (frame - self._shown) / self.model.frame_rate - now
                self._make_earlier(_SPARE - spare)

    def _make_earlier(self, seconds: float):
        """Blocks from now on, if it is more than nothing."""
        most = self.model.frames_per_block / self.model.frame_rate
        self._slack = min(self._slack + max(seconds, 0.0), most)

    def show(self, frame: int):
        """The viewer has seen the video up to this frame. One that was not made is of a video before this one.

        Raises:
            ValueError: it is no number of a frame.
        """
        check_whole_number("frame", frame, MAX_SEED)
        with self._lock:
            now, before, rate = time.monotonic(), self._shown, self.model.frame_rate
            if not before < frame < self.num_frames:
                return
            if self._shown_at is not None and before in self._last_frames:
                self._slack = max(_CALM * self._slack, _SLACK)
                # The picture stood still between two blocks, and not because the second one was sent late.
                late = now - max(self._shown_at + (frame - before) / rate, self._sent_at)
                self._make_earlier(late if late > 1.5 / rate else 0.0)
            self._shown, self._shown_at, self.active_at = frame, now, now

    def due_at(self, turn_seconds: float) -> float:
        """
        When the next block is to be made, by `time.monotonic`; never while it is paused, or the viewer has more than
        one block to show.

        It is made as late as it can be and still be in time, so that the latest prompt holds for it: so many seconds
        before the last frame is shown as a turn takes, which is `turn_seconds`, half as much again and some more for
        the way. Between two reports the viewer is taken to go on at the frame rate.
        """
        with self._lock:
            ahead, rate = self.num_frames - 1 - self._shown, self.model.frame_rate
            if self.paused or self.holders or ahead > self.model.frames_per_block:
                return math.inf
            if self._shown_at is None:
                return self.ready_at
            lead = 1.5 * turn_seconds + self._slack
            return self._shown_at + ahead / rate - lead

    def start_delay(self, turn_seconds: float, first_seconds: float = 0.0) -> float:
        """For how long the first block, once it is made, is held back for the second one to be in time: to show it may
        take less than to make the other, before which come first ones of other sessions, which take so much longer
        than a turn. Not where there is no other, or none could be in time."""
        rate = self.model.frame_rate
        if self.num_frames >= self._length or turn_seconds > self.model.frames_per_block / rate:
            return 0.0
        return max(first_seconds + 1.5 * turn_seconds + self._slack - self.num_frames / rate, 0.0)

    @property
    def block_seconds(self) -> float:
        """Of the slowest of the last blocks; before there are any, as a warm model knows it."""
        return max(self._recent, default=(1 + self.compare) * self.model.block_seconds)

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
            ready = self.ready_at = self.active_at = time.monotonic()
            # The first one encodes the prompt and allocates.
            if number:
                self._recent.append(ready - began)
            self.num_blocks += 1
            self.num_frames += len(frames)
            self._last_frames.append(self.num_frames - 1)
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
            return {
                "version": VERSION,
                "model": self.model.name,
                "weights": self.model.digest,
                "loras": self.model.lora_digests,
                "dtype": str(self.model.pipe.transformer.dtype).removeprefix("torch."),
                **self.model.settings,
                "configs": self.model.configs,
                "noise_layout": NOISE_LAYOUT,
                "seed": self.seed,
                "height": self.height,
                "width": self.width,
                "frame_rate": self.model.frame_rate,
                "num_frames": None if self.model.num_frames == math.inf else self.model.num_frames,
                "prompt": self.prompt,
                "compare": self.compare,
                # The file itself: frames of it are many times as large, and are the same whenever it is decoded.
                "start_frames": self.start_file and self.start_file.uri,
                "strength": self.strength,
                "num_blocks": self.num_blocks,
                "events": [dict(event) for event in self._taken],
            }


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


def session_arguments(model: LiveModel, record: Any) -> dict[str, Any]:
    """The arguments of the [`LiveSession`] that makes the frames of a record again; errors as of [`replay`]."""
    check_record(model, record)
    names = ("prompt", "seed", "height", "width", "compare", "events", "strength")
    values = {name: record[name] for name in names if name in record}
    values["without"] = [name for name in model.weights if name not in record["loras"]]
    if record.get("start_frames") is not None:
        values["start_file"] = StartFile.from_uri(record["start_frames"])
    return values


def read_session(model: LiveModel, data: bytes) -> dict[str, Any]:
    """[`session_arguments`] of a file with a record."""
    return session_arguments(model, parse_json(data, "the file"))


def check_form(record: Any) -> dict[str, Any]:
    """What [`LiveSession.record`] gave, or a `ValueError`."""
    needed = {"version", "weights", "loras", "seed", "height", "width", "prompt", "num_blocks", "events"}
    if not isinstance(record, dict) or not needed <= record.keys():
        raise ValueError(f"it is no session, which has {', '.join(sorted(needed))}.")
    return record


def check_record(model: LiveModel, record: Any):
    """`ValueError` unless these are values of a session which this model has made."""
    check_form(record)
    if record["version"] != VERSION or record.get("noise_layout", NOISE_LAYOUT) != NOISE_LAYOUT:
        raise ValueError(f"it is a session of another release: its version is {record['version']!r}, not {VERSION}.")
    check_whole_number("num_blocks", record["num_blocks"], MAX_SEED)
    if record["weights"] != model.digest:
        raise ValueError(f"it was made with other weights than those of {model.name}: give its model.")
    if not isinstance(record["loras"], dict):
        raise ValueError("loras must be an object of names and digests.")
    for name, digest in record["loras"].items():
        if model.lora_digests.get(name) != digest:
            raise ValueError(f"it was made with the LoRA {name}: load that one, and under this name.")
    dtype = str(model.pipe.transformer.dtype).removeprefix("torch.")
    if record.get("dtype", dtype) != dtype:
        raise ValueError(f"it was made in {record['dtype']}, not {dtype}: give that dtype.")
    for name, value in model.settings.items():
        if record.get(name, value) != value:
            raise ValueError(f"it was made with {name} {record[name]}, not {value}: give that one.")
    configs = record.get("configs", model.configs)
    for component, values in model.configs.items():
        own = configs.get(component) if isinstance(configs, dict) else None
        for name, value in values.items():
            found = own.get(name) if isinstance(own, dict) else None
            if found != value:
                raise ValueError(
                    f"it was made with another model: {name} of its {component} is {found!r:.40}, "
                    f"and here {value!r:.40}."
                )
    frames = record.get("num_frames") or math.inf
    if frames != model.num_frames:
        raise ValueError(f"its video ends after {frames} frames, this one's after {model.num_frames}.")
