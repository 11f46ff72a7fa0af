"""What a reward is, and how a name finds one."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


class RewardError(RuntimeError):
    """A reward returned something that is no reward: a wrong shape, a NaN or an infinity."""


@dataclass
class RewardOutput:
    """
    Attributes:
        scores: float32 tensor [B] on the CPU, one score a video; higher is better.
        info: parts or measurements behind the scores, each a float32 tensor [B]; they are logged, never summed.
    """

    scores: torch.Tensor
    info: dict[str, torch.Tensor] = field(default_factory=dict)


class Reward(ABC):
    """
    Base class of all rewards. A subclass is constructed without arguments, loads what it needs there, and may be
    scored from another thread than the one that made it.
    """

    @abstractmethod
    def score(
        self, videos: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None
    ) -> RewardOutput:
        """
        Args:
            videos: float tensor [B, F, C, H, W] in [0, 1], on any device.
            prompts: the B prompts the videos were generated from.
            metadata: one dict a video with whatever else its prompt file holds, or `None`.
        """


class FunctionReward(Reward):
    """A plain function `fn(videos, prompts, metadata) -> (scores, info)` as a reward; arguments as in `Reward.score`.

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


def get_reward(name: str) -> Reward:
    """
    Makes the reward that `name` means.

    Args:
        name: a registered name, or the dotted path "package.module:Name" or "package.module.Name" of a `Reward`
            subclass or of a function `fn(videos, prompts, metadata) -> (scores, info)`.

    Raises:
        ValueError: nothing has that name; the message lists the registered ones.
    """
    if name in _REGISTRY:
        return _REGISTRY[name]()
    module_name, _, attribute = name.rpartition(":" if ":" in name else ".")
    if not module_name or not attribute:
        raise ValueError(
            f"unknown reward {name!r}; known: {', '.join(sorted(_REGISTRY))}, or a dotted path 'package.module:Name'."
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
        return target()
    if callable(target) and not isinstance(target, type):
        return FunctionReward(target)
    problem = "has no such attribute" if target is None else f"holds a {type(target).__name__} there"
    raise ValueError(f"reward {name!r} is neither a Reward subclass nor a function: {module_name} {problem}.")
