"""What a reward is."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .frames import FrameRequest, prepare_frames


class RewardError(RuntimeError):
    """A reward returned something that is no reward: a wrong shape, `None`, a NaN or an infinity."""


class RewardPlacementError(ConnectionError):
    """Where a reward was to be scored, in a process of its own or on a server, nobody answers, or not as agreed."""


@dataclass
class RewardOutput:
    """`scores`, float32 [B] on the CPU, one a video, higher is better; and `info`, parts or measurements behind them,
    each float32 [B], which are logged, never summed."""

    scores: torch.Tensor
    info: dict[str, torch.Tensor] = field(default_factory=dict)

    def __getitem__(self, rows: slice) -> "RewardOutput":
        return RewardOutput(self.scores[rows], {part: values[rows] for part, values in self.info.items()})

    def checked(self, name: str, batch_size: int) -> "RewardOutput":
        """This output, of the reward `name`, in float32 on the CPU; a `RewardError` unless it has a number a video."""
        info = {p: _vector(v, f"info {p!r} of reward {name!r}", batch_size) for p, v in self.info.items()}
        return RewardOutput(_vector(self.scores, f"reward {name!r}", batch_size), info)


def _vector(values: Any, what: str, batch_size: int) -> torch.Tensor:
    values = _float_tensor(values, what)
    if tuple(values.shape) != (batch_size,):
        raise RewardError(f"{what} must hold one number a video, [{batch_size}], but has shape {list(values.shape)}.")
    # An inference tensor may not enter a loss; its clone made outside inference mode may.
    return values.clone()


class Reward(ABC):
    """
    Base class of all rewards. The arguments of a subclass are keywords with defaults, which a run sets as its
    `reward_options`. It loads what it needs when it is made, and may be scored from another thread than that one.
    """

    uses_prompt = True  # or else scores depend on the video alone
    # How many frames before the videos it looks at: `score` then has another keyword, `context`.
    num_context_frames = 0

    @abstractmethod
    def score(
        self, videos: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None
    ) -> "RewardOutput":
        """
        Args:
            videos: float tensor [B, F, C, H, W] in [0, 1], on any device; or the frames of `request`, uint8.
            prompts: the B prompts the videos were generated from.
            metadata: one dict a video with whatever else its prompt file holds, or `None`.

        With `num_context_frames` also `context`, uint8 [B, K, 3, H, W] in the videos' full size: the frames right
        before them. There are `num_context_frames` of them, or fewer, where a video has no more, down to none.
        """

    def request(self, num_frames: int, height: int, width: int) -> FrameRequest | None:
        """The part of videos of this shape that `score` is to get, as uint8; `None`: all of them, as floats."""
        return None

    def requested(self, videos: torch.Tensor) -> torch.Tensor:
        """uint8 [B, F', 3, h, w]: what `request` says of whole videos, floats; what is uint8 is that already."""
        if videos.dtype == torch.uint8:
            return videos
        return prepare_frames(videos, self.request(videos.shape[1], *videos.shape[-2:]))

    def modules(self) -> list[nn.Module]:
        """The networks of this reward: those among its attributes."""
        return [value for value in vars(self).values() if isinstance(value, nn.Module)]

    def to(self, device: str | torch.device) -> "Reward":
        """Moves the weights."""
        for module in self.modules():
            module.to(device)
        return self


class FunctionReward(Reward):
    """A plain function as a reward: `function(videos, prompts, metadata, **options)`, with arguments as in
    `Reward.score`. It returns the scores, or a pair of them and an `info`, which may be `None`; scores and each value
    of `info` are B numbers in a tensor, an array or a list."""

    def __init__(self, function: Callable, **options: Any):
        self.function, self.options = function, options

    def score(self, videos, prompts, metadata=None):
        result = self.function(videos, prompts, metadata, **self.options)
        pair = isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict | None)
        scores, info = result if pair else (result, None)
        parts = {name: _float_tensor(part, f"info {name!r}") for name, part in (info or {}).items()}
        return RewardOutput(_float_tensor(scores, "what the function returns"), parts)


def _float_tensor(values: Any, what: str) -> torch.Tensor:
    try:
        return torch.as_tensor(values, dtype=torch.float32, device="cpu")
    except (TypeError, ValueError):
        lacks = isinstance(values, (list, tuple)) and any(value is None for value in values)
        found = "there is None among them" if lacks else f"it is {values!r:.80}"
        raise RewardError(f"{what} must hold numbers, one a video, and {found}.") from None


def check_device(name: str | torch.device) -> torch.device:
    """The device of that name; `ValueError` if this machine does not have it."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"there is no device {str(name)!r}; it can be cpu or, for example, cuda:0.") from None
    number = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= number:
        there = f"{number} GPU{'s' * (number > 1)}, cuda:0 to cuda:{number - 1}" if number else "no GPU"
        raise ValueError(f"there is no device {str(name)!r}: torch finds {there} here.")
    return device


class Closing(AbstractContextManager):
    """A context manager that at its end, whatever happened inside, calls its `close`: that ends what the object has
    started, and does nothing when it is called again."""

    def __exit__(self, *exception):
        self.close()
