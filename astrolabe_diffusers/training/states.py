"""What a run goes on from beside its adapters, as JSON values and tensors: reading them runs no code."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import torch

from ..distributed.sharding import full_tensors, shard_like
from ..errors import UserError, one_line
from ..files.text import read_json
from ..layouts.tensor_files import misfits
from .policies import CURRENT


STATE_NAME = "trainer_state.json"
# Of the states of a checkpoint. Those of 0.1.0 had none, and were pickles.
FORMAT = 2
# What AdamW keeps of every parameter: a number, and two tensors of the parameter's shape.
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def policy_identity(transformer: torch.nn.Module) -> dict[str, Any]:
    """What a checkpoint's state is the state of, JSON values: another model's or LoRA's would mean something else.

    The model is known by a few values of every weight, rounded to bf16: not by its path, nor by the precision it is
    loaded in.
    """
    lora = transformer.peft_config[CURRENT]
    weights = (value for name, value in transformer.named_parameters() if ".lora_" not in name)
    values = torch.cat([value.detach().flatten()[:64].bfloat16() for value in weights])
    return {
        "rank": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_target_modules": sorted(lora.target_modules),
        "adapters": list(transformer.peft_config),
        "base model": hashlib.sha256(values.cpu().view(torch.int16).numpy().tobytes()).hexdigest()[:12],
    }


def read_state(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The trainer's state in a checkpoint of the run with this [`policy_identity`].

    Raises:
        OSError, ValueError: it cannot be read.
        UserError: it is none, or of an older version, another model or another LoRA.
    """
    path = folder / STATE_NAME
    state = read_json(path)
    if not isinstance(state, dict) or type(state.get("step")) is not int or state["step"] < 0:
        raise UserError(f"{path} is no state of a run.")
    written = state.pop("format", None)
    if written != FORMAT:
        by = "version 0.1.0" if written is None else f"another version (format {one_line(written)})"
        raise UserError(
            f"{folder} was written by {by}, whose states are not read here: a new run from its LoRA is "
            f"--init_lora {folder}, with another output_dir."
        )
    saved = state.pop("identity", None)
    if not isinstance(saved, dict):
        raise UserError(f"{path} is no state of a run.")
    for name, here in identity.items():
        there = saved.get(name)
        if there != here:
            there, here = (", ".join(map(str, v)) if isinstance(v, list) else v for v in (there, here))
            raise UserError(
                f"{folder} is of another run: {name} is {there} there and {here} here. "
                "A new run from its LoRA is --init_lora."
            )
    return state


def check_form(value: Any, like: Any, name: str = "it"):
    """A `ValueError` unless the JSON `value` has the form of `like`: the same names, a whole number where it has one
    (it counts something), a number or nothing where it has one of these, and a list of numbers where it has a list."""
    if isinstance(like, dict):
        form, fits = ", ".join(like), isinstance(value, dict) and value.keys() == like.keys()
    elif isinstance(like, list):
        form, fits = "a list of numbers", isinstance(value, list) and all(map(_is_number, value))
    elif isinstance(like, int):
        form, fits = "a whole number from 0", type(value) is int and value >= 0
    else:
        form, fits = "a number", value is None or _is_number(value)
    if not fits:
        raise ValueError(f"{name} must {'have' if isinstance(like, dict) else 'be'} {form}, not {value!r:.80}")
    if isinstance(like, dict):
        for key, item in like.items():
            check_form(value[key], item, key if name == "it" else f"{name}.{key}")


def _is_number(value: Any) -> bool:
    return type(value) is int or type(value) is float and math.isfinite(value)


def optimizer_tensors(
    parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """The moments of AdamW for the first process, `<parameter>.<moment>`; none before its first step."""
    return full_tensors(
        {
            f"{name}.{moment}": value
            for name, parameter in parameters.items()
            for moment, value in optimizer.state.get(parameter, {}).items()
        }
    )


def check_optimizer_tensors(tensors: dict[str, torch.Tensor], parameters: dict[str, torch.nn.Parameter]):
    """A `ValueError` unless [`optimizer_tensors`] may have returned these for `parameters`. A parameter that never had
    a gradient has no moments."""
    shapes = {
        f"{name}.{moment}": torch.Size() if moment == "step" else parameter.shape
        for name, parameter in parameters.items()
        for moment in MOMENTS
        if any(f"{name}.{other}" in tensors for other in MOMENTS)
    }
    if found := misfits(tensors, shapes):
        raise ValueError(found)
    for name, value in tensors.items():
        if value.dtype != torch.float32:
            raise ValueError(f"{name} is {value.dtype}, not float32")


def load_optimizer(
    tensors: dict[str, torch.Tensor], parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
):
    """Gives an optimizer the moments from [`optimizer_tensors`]. Its settings stay: a learning rate that a run is
    started with goes before that of the checkpoint. Of sharded parameters every process calls it."""
    state = {}
    for index, (name, parameter) in enumerate(parameters.items()):
        if f"{name}.step" in tensors:
            # Cloned: a tensor that was read from a file lies in it, and the file may be removed.
            step, *moments = (tensors[f"{name}.{moment}"].clone() for moment in MOMENTS)
            state[index] = dict(zip(MOMENTS, (step, *(shard_like(moment, parameter) for moment in moments))))
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
