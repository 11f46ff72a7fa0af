"""What a reward is, and how a name finds one."""

from __future__ import annotations

import importlib
import inspect
import math
import types
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn

from ..spelling import close_matches
from .frame_request import FrameRequest, prepare_frames


class RewardError(RuntimeError):
    """A reward returned something that is no reward: a wrong shape, a NaN or an infinity."""


class RewardPlaceError(ConnectionError):
    """Where a reward was to be scored, in a process of its own or on a server, nobody answers, or not as agreed."""


@dataclass
class RewardOutput:
    """
    Attributes:
        scores: float32 tensor [B] on the CPU, one score a video; higher is better.
        info: parts or measurements behind the scores, each a float32 tensor [B]; they are logged, never summed.
    """

    scores: torch.Tensor
    info: dict[str, torch.Tensor] = field(default_factory=dict)

    def __getitem__(self, rows: slice) -> RewardOutput:
        return RewardOutput(self.scores[rows], {part: values[rows] for part, values in self.info.items()})

    @classmethod
    def cat(cls, outputs: list[RewardOutput]) -> RewardOutput:
        """Those of one reward for several batches as one."""
        info = {part: torch.cat([output.info[part] for output in outputs]) for part in outputs[0].info}
        return cls(torch.cat([output.scores for output in outputs]), info)

    def checked(self, name: str, batch_size: int) -> RewardOutput:
        """This output, of the reward `name`, in float32 on the CPU; a `RewardError` unless it has a number a video."""
        info = {p: _vector(v, f"info {p!r} of reward {name!r}", batch_size) for p, v in self.info.items()}
        return RewardOutput(_vector(self.scores, f"reward {name!r}", batch_size), info)


def _vector(values: torch.Tensor, what: str, batch_size: int) -> torch.Tensor:
    if tuple(values.shape) != (batch_size,):
        raise RewardError(f"{what} must hold one number a video, [{batch_size}], but has shape {list(values.shape)}.")
    # An inference tensor may not enter a loss; its clone made outside inference mode may.
    return values.to("cpu", torch.float32).clone()


class Reward(ABC):
    """
    Base class of all rewards. The arguments of a subclass are keywords with defaults, which a run sets as its
    `reward_options`. It loads what it needs when it is made, and may be scored from another thread than that one.

    Attributes:
        uses_prompt: `False` says that scores depend on the video alone, so that a server may remember them.
    """

    uses_prompt = True

    @abstractmethod
    def score(
        self, videos: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None
    ) -> RewardOutput:
        """
        Args:
            videos: float tensor [B, F, C, H, W] in [0, 1], on any device; or the frames of `request`, uint8.
            prompts: the B prompts the videos were generated from.
            metadata: one dict a video with whatever else its prompt file holds, or `None`.
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

    def to(self, device: str | torch.device) -> Reward:
        """Moves the weights."""
        for module in self.modules():
            module.to(device)
        return self


class FunctionReward(Reward):
    """A plain function `fn(videos, prompts, metadata) -> (scores, info)` as a reward; arguments as in `Reward.score`.
    Further arguments of the function are its options.

    `scores` and each value of `info` (which may be `None`) are B numbers in a tensor, an array or a list.
    """

    def __init__(self, function: Callable):
        self.function = function

    def score(self, videos, prompts, metadata=None):
        scores, info = self.function(videos, prompts, metadata)
        return RewardOutput(_float_tensor(scores), {name: _float_tensor(part) for name, part in (info or {}).items()})


def _float_tensor(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float32, device="cpu")


_REGISTRY: dict[str, type[Reward]] = {}


def register_reward(name: str) -> Callable[[type[Reward]], type[Reward]]:
    """Class decorator: makes a `Reward` known by `name`. A name that is taken raises `ValueError`."""

    def register(cls: type[Reward]) -> type[Reward]:
        if name in _REGISTRY:
            raise ValueError(f"the reward name {name!r} is taken by {_REGISTRY[name].__qualname__}.")
        _REGISTRY[name] = cls
        return cls

    return register


def get_reward(name: str, defaults: dict[str, Any] | None = None, **options: Any) -> Reward:
    """
    Makes the reward that `name` means, with these options.

    Args:
        name: a registered name, or the dotted path "package.module:Name" or "package.module.Name" of a `Reward`
            subclass or of a function `fn(videos, prompts, metadata) -> (scores, info)`.
        defaults: further options, for a reward that has them: `{"fps": 16.0}`, frames a second of the videos.

    Raises:
        ValueError: nothing has that name, or it has no such option; the message lists those that there are.
    """
    if name in _REGISTRY:
        return _make(name, _REGISTRY[name], options, defaults)
    module_name, _, attribute = name.rpartition(":" if ":" in name else ".")
    if not module_name or not attribute:
        raise ValueError(
            f"unknown reward {name!r}{close_matches(name, _REGISTRY)}; known: {', '.join(sorted(_REGISTRY))}, or a "
            "dotted path 'package.module:Name'."
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that exists but misses one of its own imports must say so itself.
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise
        raise ValueError(
            f"unknown reward {name!r}: no module named {error.name!r} (is its folder on PYTHONPATH?); "
            f"known: {', '.join(sorted(_REGISTRY))}."
        ) from None
    target = getattr(module, attribute, None)
    if isinstance(target, type) and issubclass(target, Reward):
        return _make(name, target, options, defaults)
    if callable(target) and not isinstance(target, type):
        # The first three arguments are videos, prompts and metadata.
        parameters = list(inspect.signature(target).parameters.values())[3:]
        return FunctionReward(partial(target, **_all_options(name, parameters, _hints(target), options, defaults)))
    problem = f"holds a {type(target).__name__} there"
    if target is None:
        problem = f"has no such attribute{close_matches(attribute, vars(module))}"
    raise ValueError(f"reward {name!r} is neither a Reward subclass nor a function: {module_name} {problem}.")


def _make(name: str, cls: type[Reward], options: dict[str, Any], defaults: dict[str, Any] | None) -> Reward:
    parameters = list(inspect.signature(cls).parameters.values())
    return cls(**_all_options(name, parameters, _hints(cls.__init__), options, defaults))


def _hints(function: Callable) -> dict[str, Any]:
    try:
        return get_type_hints(function)
    except (NameError, TypeError):
        # Names that are only imported for type checkers, and callables that are no functions.
        return {}


def _all_options(
    name: str,
    parameters: list[inspect.Parameter],
    hints: dict[str, Any],
    options: dict[str, Any],
    defaults: dict[str, Any] | None,
) -> dict[str, Any]:
    known = [parameter.name for parameter in parameters if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    unknown = [option for option in options if option not in known]
    if unknown and len(known) == len(parameters):
        raise ValueError(f"reward {name!r} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}.")
    for parameter in parameters:
        if parameter.name in options:
            _check_option(name, parameter, hints.get(parameter.name), options[parameter.name])
    return {option: value for option, value in (defaults or {}).items() if option in known} | options


_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}


def _check_option(name: str, parameter: inspect.Parameter, hint: Any, value: Any):
    """`ValueError` unless a value is of the type that is declared, or, where none is, of the kind of the default."""
    if hint is None:
        kind = type(parameter.default)
        # Who writes 1 as a default need not mean whole numbers.
        hint = float if kind in (int, float) else kind if kind in (str, bool) else Any
    choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if not any(_is_a(value, choice) for choice in choices):
        wanted = " or ".join(_KINDS.get(choice, getattr(choice, "__name__", str(choice))) for choice in choices)
        raise ValueError(f"the option {parameter.name!r} of reward {name!r} must be {wanted}, not {value!r}.")


def _is_a(value: Any, hint: Any) -> bool:
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    kind = get_origin(hint) or hint
    # What is no class, such as `Any`, is not for us to check.
    return not isinstance(kind, type) or kind is Any or isinstance(value, kind)


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
