"""The checkpoints of a run, tensors and JSON alone, so that reading them runs no code."""

import hashlib
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file

from ..distributed.agreement import is_first_process, raise_together
from ..distributed.sharding import full_tensors, shard_like, together, whole_weight
from ..errors import UserError, as_user_error, one_line
from ..files.output_folder import checkpoint_step, list_checkpoints, set_aside
from ..files.text import read_json
from ..files.writing import PARTIAL, find_damage, seal, to_disk
from ..layouts.tensor_files import misfits
from ..models.expert_pair import adapted_experts, experts_of
from .adapter_files import load_adapter, save_adapter
from .config import OnlineConfig
from .policies import CURRENT


OPTIMIZER_NAME = "optimizer.safetensors"
STATE_NAME = "trainer_state.json"
# Of the states of a checkpoint. Those of 0.1.0 had none, and were pickles.
FORMAT = 2
# What AdamW keeps of every parameter: a number, and two tensors of the parameter's shape.
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class Checkpoints:
    """Checkpoints of a run, each a folder `<output_dir>/checkpoints/checkpoint-N`.

    It holds every adapter, the optimizer, `config.yaml` and `trainer_state.json`, and can be given to
    `pipe.load_lora_weights`; no states of random generators, for every epoch seeds them anew. It is written under
    another name and renamed when it is complete and on the disk; `files.json` tells whether it still is.
    """

    transformer: torch.nn.Module  # unwrapped
    optimizer: torch.optim.Optimizer  # AdamW over the current policy's parameters, prepared or not
    config: OnlineConfig
    identity: dict[str, Any]  # from `policy_identity`, before the model was prepared

    def __post_init__(self):
        self.folder = Path(self.config.output_dir) / "checkpoints"
        # By name, in the order of `policy_parameters`, which is the optimizer's.
        named = self.transformer.named_parameters()
        self.parameters = {name: parameter for name, parameter in named if f".{CURRENT}." in name}

    def list(self) -> list[Path]:
        """Checkpoints, oldest first."""
        return list_checkpoints(self.folder.parent)

    def path(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Writes checkpoint `step`, which there is not yet, with the trainer's `state`, JSON values; every process
        calls it. A [`UserError`] in each if it cannot be written; those before stay."""
        final, is_first = self.path(step), is_first_process()
        partial = final.with_name(final.name + PARTIAL)
        with raise_together(), as_user_error(f"cannot write {partial}"):
            if is_first:
                partial.mkdir(parents=True)
        with together(), as_user_error(f"cannot write {partial}"):
            for adapter in self.transformer.peft_config:
                save_adapter(self.transformer, partial, adapter)
            moments = optimizer_tensors(self.parameters, self.optimizer)
            if is_first:
                save_file(moments, partial / OPTIMIZER_NAME)
        with raise_together(), as_user_error(f"cannot write {final}"):
            if is_first:
                self.config.save(partial / "config.yaml")
                (partial / STATE_NAME).write_text(json.dumps({"format": FORMAT, "identity": self.identity, **state}))
                seal(partial)
                partial.rename(final)
                to_disk(self.folder)
                if limit := self.config.checkpoints_total_limit:
                    for path in self.list()[:-limit]:
                        # First the name: a kill in the middle must not leave half a checkpoint.
                        shutil.rmtree(path.rename(path.with_name(path.name + PARTIAL)))
        return final

    def find(self, name: str | None) -> "tuple[Path | None, list[str]]":
        """The checkpoint to begin with, and what there is to say about it, line by line; every process calls it.

        `name` is `"latest"`, of which a damaged one is passed over for the one before, a path or `checkpoint-N`.
        Without a checkpoint the run starts anew. Left-overs of a kill are removed, and checkpoints of later steps,
        which would be taken for this run's, are set aside under another name. A [`UserError`] if there is no such
        checkpoint, or it is damaged, or of another model or LoRA, or its run would end within an epoch.
        """
        path, lines = None, []
        with raise_together(), as_user_error(f"cannot use {self.folder}"):
            if is_first_process():
                for left_over in self.folder.glob(f"checkpoint-*{PARTIAL}"):
                    shutil.rmtree(left_over)
                if name is not None:
                    path, lines = self._choose(name)
                step = -1 if path is None else read_state(path, self.identity)["step"]
                if path is not None:
                    self.config.check_resumed(step, path.name)
                later = [checkpoint for checkpoint in self.list() if checkpoint_step(checkpoint) > step]
                for checkpoint in later:
                    set_aside(checkpoint)
                if later:
                    lines.append(f"set aside, as .set_aside: {', '.join(checkpoint.name for checkpoint in later)}")
        return tuple(broadcast_object_list([path, lines]))

    def _choose(self, name: str) -> "tuple[Path | None, list[str]]":
        lines = []
        if name == "latest":
            for path in reversed(self.list()):
                damage = find_damage(path)
                if damage is None:
                    return path, lines
                lines.append(f"{path.name} is damaged: {damage}; taking the one before")
            return None, lines
        path = next((path for path in (Path(name), self.folder / name) if path.is_dir()), None)
        if path is None:
            known = ", ".join(path.name for path in self.list()) or "none"
            raise UserError(f"no checkpoint {name}; {self.folder} has: {known}.")
        if damage := find_damage(path):
            raise UserError(f"{path} is damaged: {damage}; take another one, or `latest`.")
        return path, lines

    def load(self, path: Path, like: dict[str, Any]) -> dict[str, Any]:
        """Restores adapters and optimizer, and returns the trainer's state, of the form of `like`; every process calls
        it. A [`UserError`] in each if something is not what [`~Checkpoints.save`] wrote."""
        with raise_together(), as_user_error(f"cannot resume from {path}"):
            state = read_state(path, self.identity)
            with as_user_error(f"{path / STATE_NAME} is no state of this run"):
                check_form(state, like)
            with as_user_error(f"{path / OPTIMIZER_NAME} does not fit this run"):
                moments = load_file(path / OPTIMIZER_NAME)
                check_optimizer_tensors(moments, self.parameters)
        with together(), as_user_error(f"cannot use {path}"):
            for adapter in self.transformer.peft_config:
                load_adapter(self.transformer, path, adapter)
            load_optimizer(moments, self.parameters, self.optimizer)
        return state


def policy_identity(transformer: torch.nn.Module) -> dict[str, Any]:
    """What a checkpoint's state is the state of, JSON values: another model's or LoRA's would mean something else.

    The model is known by a few values of every weight, rounded to bf16: not by its path, nor by the precision it is
    loaded in.
    """
    lora = transformer.peft_config[CURRENT]
    weights = (whole_weight(value) for name, value in transformer.named_parameters() if ".lora_" not in name)
    values = torch.cat([value.flatten()[:64].bfloat16() for value in weights])
    is_pair = len(experts_of(transformer)) > 1
    return ({"experts with a LoRA": list(adapted_experts(transformer))} if is_pair else {}) | {
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
