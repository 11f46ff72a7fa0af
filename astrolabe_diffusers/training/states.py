"""The state of a run's optimizer as tensors, and the form of what else a checkpoint holds: reading runs no code."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..distributed.sharding import full_tensor, shard_like
from .policies import CURRENT


# What AdamW keeps of every parameter: a number, and two tensors of the parameter's shape.
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def trained_parameters(transformer: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The current policy's parameters by name, in the order of `policy_parameters`, which is the optimizer's."""
    return {name: value for name, value in transformer.named_parameters() if f".{CURRENT}." in name}


def optimizer_tensors(
    parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, write: bool = True
) -> dict[str, torch.Tensor]:
    """The moments of AdamW as whole tensors on the CPU, `<parameter>.<moment>`; none before its first step.

    Of sharded parameters every process calls it, and gets them with `write`.
    """
    tensors = {}
    for name, parameter in parameters.items():
        for moment, value in optimizer.state.get(parameter, {}).items():
            whole = full_tensor(value)
            if write:
                tensors[f"{name}.{moment}"] = whole.cpu()
    return tensors


def check_optimizer_tensors(tensors: dict[str, torch.Tensor], parameters: dict[str, torch.nn.Parameter]):
    """A `ValueError` unless [`optimizer_tensors`] may have returned these for `parameters`. A parameter that never had
    a gradient has no moments."""
    shapes = {
        f"{name}.{moment}": torch.Size() if moment == "step" else parameter.shape
        for name, parameter in parameters.items()
        for moment in MOMENTS
        if any(f"{name}.{other}" in tensors for other in MOMENTS)
    }
    if foreign := sorted(shapes.keys() ^ tensors.keys()):
        raise ValueError(f"{len(foreign)} tensors are too much or missing, such as {foreign[0]}")
    for name, shape in shapes.items():
        value = tensors[name]
        if value.shape != shape or value.dtype != torch.float32:
            raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)}, not float32 {tuple(shape)}")


def load_optimizer(
    tensors: dict[str, torch.Tensor],
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
):
    """Gives an optimizer the moments from [`optimizer_tensors`]. Its settings stay: a learning rate that a run is
    started with goes before that of the checkpoint. Of sharded parameters every process calls it."""
    state = {}
    for index, (name, parameter) in enumerate(parameters.items()):
        if f"{name}.step" in tensors:
            # Cloned: a tensor that was read from a file lies in it, and the file may be removed.
            step, *moments = (tensors[f"{name}.{moment}"].clone() for moment in MOMENTS)
            moments = [shard_like(moment, parameter) for moment in moments]
            state[index] = dict(zip(MOMENTS, (step, *moments)))
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def check_form(value: Any, like: Any, name: str = "it"):
    """A `ValueError` unless the JSON `value` has the form of `like`: the same names, a whole number where it has one
    (it counts something), a number or nothing where it has one of these, and a list of numbers where it has a list."""
    if isinstance(like, dict):
        if not isinstance(value, dict) or value.keys() != like.keys():
            raise ValueError(f"{name} must have {', '.join(like)}, not {_short(value)}")
        for key, item in like.items():
            check_form(value[key], item, key if name == "it" else f"{name}.{key}")
    elif isinstance(like, list):
        if not isinstance(value, list) or not all(map(_is_number, value)):
            raise ValueError(f"{name} must be a list of numbers, not {_short(value)}")
    elif isinstance(like, int):
        if type(value) is not int or value < 0:
            raise ValueError(f"{name} must be a whole number from 0, not {_short(value)}")
    elif value is not None and not _is_number(value):
        raise ValueError(f"{name} must be a number, not {_short(value)}")


def _is_number(value: Any) -> bool:
    return type(value) is int or type(value) is float and math.isfinite(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."
