"""The JSON of a session: what it was made with, and whether a model makes the same frames of it."""

import math
from typing import Any

from ..files.text import parse_json
from ..pipelines.block_generation import NOISE_LAYOUT
from .model import MAX_SEED, LiveModel, check_whole_number
from .start_file import StartFile


# Of the JSON of a session.
VERSION = 1
# Of its file, with the one that it starts from.
MAX_SESSION_BYTES = 2**24


def make_record(
    model: LiveModel,
    *,
    prompt: str,
    seed: int,
    height: int,
    width: int,
    compare: bool,
    start_file: StartFile | None,
    strength: float | None,
    num_blocks: int,
    events: list[dict[str, Any]],
) -> dict[str, Any]:
    """[`LiveSession.record`]; `events` have the `block` that they came with."""
    return {
        "version": VERSION,
        "model": model.name,
        "weights": model.digest,
        "loras": model.lora_digests,
        "dtype": str(model.pipe.transformer.dtype).removeprefix("torch."),
        **model.settings,
        "configs": model.configs,
        "noise_layout": NOISE_LAYOUT,
        "seed": seed,
        "height": height,
        "width": width,
        "frame_rate": model.frame_rate,
        "num_frames": None if model.num_frames == math.inf else model.num_frames,
        "prompt": prompt,
        "compare": compare,
        # The file itself: frames of it are many times as large, and are the same whenever it is decoded.
        "start_frames": start_file and start_file.uri,
        "strength": strength,
        "num_blocks": num_blocks,
        "events": [dict(event) for event in events],
    }


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
