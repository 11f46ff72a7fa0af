"""Videos and scores as bytes, for other processes and machines. Nothing that is read here can run code."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ...files.text import parse_json
from ..frames import FrameRequest, prepare_frames, to_uint8
from ..reward import RewardOutput


# Of what client and server send each other. 2: frames may be gray. 3: there may be those before the videos.
VERSION = 3


@dataclass
class ScoringJob:
    """
    Videos to be scored, as they travel.

    Attributes:
        frames: for each reward that is asked, uint8 [B, F', 3 or 1, h, w]: what it requested, or the whole videos.
            Rewards with the same request have the same tensor, which travels once.
        whole: the rewards that made no request, and want the videos as floats.
        prompts, metadata: as in `Reward.score`.
        context: uint8 [B, K, 3, H, W], the frames before the videos, if a reward looks at them.
    """

    frames: dict[str, torch.Tensor]
    whole: frozenset[str]
    prompts: list[str]
    metadata: list[dict[str, Any]] | None
    context: torch.Tensor | None = None

    @classmethod
    def make(
        cls,
        videos: torch.Tensor,
        requests: dict,
        prompts: list[str],
        metadata: list[dict] | None,
        context: torch.Tensor | None = None,
        num_context_frames: int = 0,
    ) -> Self:
        """The job for videos [B, F, 3, H, W] in [0, 1] after those of `context`; `requests` and `num_context_frames`
        as `LocalRewards` has them."""
        every = FrameRequest(tuple(range(videos.shape[1])))
        prepared = {request: prepare_frames(videos, request or every).cpu() for request in set(requests.values())}
        whole = frozenset(name for name, request in requests.items() if request is None)
        frames = {name: prepared[request] for name, request in requests.items()}
        context = context_frames(videos, context, num_context_frames)
        return cls(frames, whole, list(prompts), metadata, None if context is None else context.cpu())

    def kind(self) -> tuple:
        """Jobs of one kind ask the same rewards about videos of one shape, all with metadata or all without."""
        context = None if self.context is None else self.context.shape[1:]
        shapes = {name: tensor.shape[1:] for name, tensor in self.frames.items()}
        return self.whole, shapes, self.metadata is None, context

    @classmethod
    def join(cls, jobs: Sequence[Self]) -> Self:
        """One job of several of one kind."""
        if len(jobs) == 1:
            return jobs[0]
        joined, frames = {}, {}
        for name in jobs[0].frames:
            # Rewards that share frames in every job still do.
            tensors = tuple(id(job.frames[name]) for job in jobs)
            if tensors not in joined:
                joined[tensors] = torch.cat([job.frames[name] for job in jobs])
            frames[name] = joined[tensors]
        prompts = [prompt for job in jobs for prompt in job.prompts]
        metadata = None if jobs[0].metadata is None else [entry for job in jobs for entry in job.metadata]
        context = None if jobs[0].context is None else torch.cat([job.context for job in jobs])
        return cls(frames, jobs[0].whole, prompts, metadata, context)


def context_frames(videos: torch.Tensor, context: torch.Tensor | None, number: int) -> torch.Tensor | None:
    """uint8 [B, K, 3, H, W], the last `number` frames of those before videos, or fewer; `None` if `number` is 0."""
    if number == 0:
        return None
    context = videos[:, :0] if context is None else context
    return to_uint8(context[:, max(context.shape[1] - number, 0) :])


def pack_job(job: ScoringJob) -> bytes:
    tensors = {id(tensor): tensor for tensor in job.frames.values()}
    keys = {number: str(i) for i, number in enumerate(tensors)}
    text = {
        "version": VERSION,
        "rewards": {name: keys[id(tensor)] for name, tensor in job.frames.items()},
        "whole": sorted(job.whole),
        "prompts": job.prompts,
        "metadata": job.metadata,
    }
    header = torch.frombuffer(bytearray(json.dumps(text).encode()), dtype=torch.uint8)
    context = {} if job.context is None else {"context": job.context.contiguous()}
    frames = {keys[number]: tensor.contiguous() for number, tensor in tensors.items()}
    return save({"header": header, **context, **frames})


def unpack_job(data: bytes) -> ScoringJob:
    """Raises `ValueError` unless `data` is a job of which everything fits together."""
    try:
        tensors = load(data)
        context = tensors.pop("context", None)
        text = parse_json(tensors.pop("header").numpy().tobytes(), "the header")
        version = text.get("version", 1)
        frames = {name: tensors[key] for name, key in text["rewards"].items()}
        whole, prompts, metadata = frozenset(text["whole"]), text["prompts"], text["metadata"]
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"this is no job for rewards: {type(error).__name__} {error}") from error
    if version != VERSION:
        raise ValueError(f"the job is of version {version!r}, not {VERSION}: both ends need the same release.")
    if not frames or not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("a job must name rewards and hold a list of prompts.")
    if metadata is not None and (not isinstance(metadata, list) or len(metadata) != len(prompts)):
        raise ValueError(f"metadata must be null or one object for each of the {len(prompts)} prompts.")
    for name, tensor in frames.items():
        channels = (3,) if name in whole else (1, 3)
        fits = tensor.dtype == torch.uint8 and tensor.ndim == 5 and len(tensor) == len(prompts) and tensor.numel()
        if not fits or tensor.shape[2] not in channels:
            raise ValueError(
                f"the frames for {name!r} must be uint8 [{len(prompts)}, F, 3, H, W], one video a prompt and none of "
                f"them empty, not {tensor.dtype} {list(tensor.shape)}."
            )
    if context is not None and not (
        context.dtype == torch.uint8 and context.ndim == 5 and len(context) == len(prompts) and context.shape[2] == 3
    ):
        raise ValueError(f"the context must be uint8 [{len(prompts)}, K, 3, H, W], not {list(context.shape)}.")
    return ScoringJob(frames, whole, prompts, metadata, context)


def requests_to_json(requests: dict[str, FrameRequest | None]) -> dict[str, Any]:
    return {name: request and asdict(request) for name, request in requests.items()}


def requests_from_json(value: dict[str, Any]) -> dict[str, FrameRequest | None]:
    def request(frames, sizes, gray) -> FrameRequest:
        return FrameRequest(tuple(frames), tuple(tuple(size) for size in sizes), gray)

    return {name: part and request(**part) for name, part in value.items()}


def outputs_to_json(outputs: dict[str, RewardOutput]) -> dict[str, Any]:
    """Numbers that are not finite, which JSON lacks, are text."""
    return {
        name: {"scores": _numbers(output.scores), "info": {k: _numbers(v) for k, v in output.info.items()}}
        for name, output in outputs.items()
    }


def outputs_from_json(value: Any, names: Sequence[str], batch_size: int) -> dict[str, RewardOutput]:
    """Raises `ValueError` unless there is one number for each of the videos from each of the rewards `names`."""
    if not isinstance(value, dict) or set(value) != set(names):
        raise ValueError(f"the answer must hold scores of {', '.join(names)}.")
    outputs = {}
    for name, output in value.items():
        try:
            parts = {"scores": output["scores"], **output["info"]}
            vectors = {part: torch.tensor([float(x) for x in values]) for part, values in parts.items()}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the answer holds no numbers for {name!r}: {type(error).__name__}") from error
        for part, vector in vectors.items():
            if len(vector) != batch_size:
                raise ValueError(f"{name!r}: {len(vector)} numbers in {part!r} for {batch_size} videos.")
        outputs[name] = RewardOutput(vectors.pop("scores"), vectors)
    return outputs


def _numbers(values: torch.Tensor) -> list[float | str]:
    return [x if math.isfinite(x) else str(x) for x in values.tolist()]
