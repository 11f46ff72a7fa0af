"""LoRA files and checkpoints of a run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from peft import get_peft_model_state_dict

from ..distributed.agreement import raise_together
from ..distributed.sharding import full_tensor, is_sharded, shard_like
from ..errors import UserError, as_user_error, one_line
from ..files.output_folder import checkpoint_step, list_checkpoints, set_aside
from ..files.seal import find_damage, seal, to_disk
from ..files.writing import replacing
from ..pipelines.pipeline_causal_wan import CausalWanPipeline
from .config import OnlineConfig
from .policies import CURRENT, OLD
from .states import (
    check_form,
    check_optimizer_tensors,
    load_optimizer,
    optimizer_tensors,
    trained_parameters,
)


# The current policy's file has the name that `load_lora_weights(folder)` looks for.
WEIGHT_NAMES = {
    CURRENT: "pytorch_lora_weights.safetensors",
    **{name: f"pytorch_lora_weights_{name}.safetensors" for name in (OLD, "reference", "ema")},
}
STATE_NAME = "trainer_state.json"
OPTIMIZER_NAME = "optimizer.safetensors"
# Of the states of a checkpoint. Those of 0.1.0 had none, and were pickles.
FORMAT = 2
PREFIX = "transformer."


def save_adapter(
    transformer: torch.nn.Module,
    folder: str | Path,
    adapter: str = CURRENT,
    weight_name: str | None = None,
    write: bool = True,
):
    """Writes an adapter in Diffusers format, with its LoraConfig in the header so that alpha survives.

    Of a sharded transformer every process calls it, and one of them with `write`.
    """
    layers = {}
    for name, value in get_peft_model_state_dict(transformer, adapter_name=adapter).items():
        whole = full_tensor(value)
        if write:
            layers[name] = whole.cpu()
    if write:
        with replacing(Path(folder) / (weight_name or WEIGHT_NAMES[adapter])) as path:
            CausalWanPipeline.save_lora_weights(
                path.parent,
                transformer_lora_layers=layers,
                weight_name=path.name,
                transformer_lora_adapter_metadata=transformer.peft_config[adapter].to_dict(),
            )


def load_adapter(transformer: torch.nn.Module, folder: str | Path, adapter: str = CURRENT):
    """Reads an adapter that [`save_adapter`] wrote into the existing one; a [`UserError`] if it does not fit."""
    path = Path(folder) / WEIGHT_NAMES[adapter]
    with as_user_error(f"cannot read the adapter {path}"):
        if not path.is_file():
            raise FileNotFoundError("no such file.")
        loaded = safetensors.torch.load_file(path)
    loaded = {key.removeprefix(PREFIX): value for key, value in loaded.items()}
    expected = get_peft_model_state_dict(transformer, adapter_name=adapter)
    foreign = sorted(expected.keys() ^ loaded.keys())
    if foreign:
        raise UserError(
            f"the adapter {path} does not fit this model and lora_target_modules: {len(foreign)} weights are in one "
            f"and not in the other, such as {foreign[0]}."
        )
    for key, value in expected.items():
        if value.shape != loaded[key].shape:
            # The rank is the first dimension of A and the second of B.
            axis = 0 if "lora_A" in key else 1
            ranks = loaded[key].shape[axis], value.shape[axis]
            reason = "it is another model's"
            if ranks[0] != ranks[1]:
                reason = f"it has rank {ranks[0]}, this run has rank {ranks[1]}"
            raise UserError(
                f"the adapter {path} has the wrong size: {reason} "
                f"({key} is {tuple(loaded[key].shape)}, not {tuple(value.shape)})."
            )
    with torch.no_grad():
        for key, value in expected.items():  # the parameters themselves
            value.copy_(shard_like(loaded[key], value))


def policy_identity(transformer: torch.nn.Module) -> dict[str, Any]:
    """What a checkpoint's state is the state of, JSON values: another model's or LoRA's would mean something else.

    The model is known by a few values of every weight, rounded to bf16: not by its path, nor by the precision it is
    loaded in.
    """
    lora = transformer.peft_config[CURRENT]
    weights = {name: value for name, value in transformer.named_parameters() if ".lora_" not in name}
    values = torch.cat([value.detach().flatten()[:64].bfloat16() for value in weights.values()])
    return {
        "rank": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_target_modules": sorted(lora.target_modules),
        "adapters": list(transformer.peft_config),
        "base model": hashlib.sha256(values.cpu().view(torch.int16).numpy().tobytes()).hexdigest()[:12],
    }


class Checkpoints:
    """Checkpoints of a run, each a folder `<output_dir>/checkpoints/checkpoint-N`.

    It holds every adapter, the optimizer, `config.yaml` and `trainer_state.json`, all of it tensors, JSON and YAML,
    and can be given to `pipe.load_lora_weights`; no states of random generators, for every epoch seeds them anew. It
    is written under another name and renamed when it is complete and on the disk; `files.json` tells whether it still
    is.

    Args:
        accelerator: of the run.
        transformer: the unwrapped transformer.
        optimizer: AdamW over the current policy's parameters, prepared or not.
        config: `output_dir`, `checkpoints_total_limit` (the oldest go), and all that is saved as `config.yaml`.
        identity: from [`policy_identity`], before the model was prepared.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        transformer: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        config: OnlineConfig,
        identity: dict[str, Any],
    ):
        self.accelerator = accelerator
        self.transformer = transformer
        self.optimizer = optimizer
        self.config = config
        self.identity = identity
        self.folder = Path(config.output_dir) / "checkpoints"

    def list(self) -> list[Path]:
        """Checkpoints, oldest first."""
        return list_checkpoints(self.folder.parent)

    def path(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Writes checkpoint `step`, which there is not yet; every process calls it. `state` is what the trainer wants
        back, JSON values.

        Raises:
            UserError: in every process, if it cannot be written; those before stay.
        """
        final = self.path(step)
        partial = final.with_name(f"{final.name}.partial")
        with raise_together(), as_user_error(f"cannot write {partial}"):
            if self.accelerator.is_main_process:
                partial.mkdir(parents=True)
        # While a sharded state is written, processes wait for each other: there an error must end its process at once.
        with contextlib.nullcontext() if is_sharded() else raise_together(), as_user_error(f"cannot write {partial}"):
            self._write_states(partial)
        with raise_together(), as_user_error(f"cannot write {final}"):
            if self.accelerator.is_main_process:
                self.config.save(partial / "config.yaml")
                state = {"format": FORMAT, "identity": self.identity, **state}
                (partial / STATE_NAME).write_text(json.dumps(state))
                seal(partial)
                partial.rename(final)
                to_disk(self.folder)
                if limit := self.config.checkpoints_total_limit:
                    for path in self.list()[:-limit]:
                        # First the name: a kill in the middle must not leave half a checkpoint.
                        shutil.rmtree(path.rename(path.with_name(f"{path.name}.partial")))
        return final

    def _write_states(self, folder: Path):
        write = self.accelerator.is_main_process
        for adapter in self.transformer.peft_config:
            save_adapter(self.transformer, folder, adapter, write=write)
        moments = optimizer_tensors(trained_parameters(self.transformer), self.optimizer, write)
        if write:
            safetensors.torch.save_file(moments, folder / OPTIMIZER_NAME)

    def find(self, name: str | None) -> tuple[Path | None, list[str]]:
        """The checkpoint to begin with, and what there is to say about it, line by line; every process calls it.

        Args:
            name: `"latest"`, a path or `checkpoint-N`; `None` starts anew.

        Returns:
            `None` for the checkpoint to start anew: also for `"latest"` if there is none. One that is damaged is
            passed over for the one before. Left-overs of a kill are removed, and checkpoints of later steps, which
            would be taken for this run's, are set aside under another name.

        Raises:
            UserError: no such checkpoint, or it is damaged, or of another model or LoRA.
        """
        found = None
        with raise_together(), as_user_error(f"cannot use {self.folder}"):
            if self.accelerator.is_main_process:
                found = self._find(name)
        return broadcast_object_list([found])[0]

    def _find(self, name: str | None) -> tuple[Path | None, list[str]]:
        for left_over in self.folder.glob("checkpoint-*.partial"):
            shutil.rmtree(left_over)
        path, step, lines = None, -1, []
        if name == "latest":
            for candidate in reversed(self.list()):
                if damage := find_damage(candidate):
                    lines.append(f"{candidate.name} is damaged: {damage}; taking the one before")
                else:
                    path = candidate
                    break
        elif name is not None:
            path = next((path for path in (Path(name), self.folder / name) if path.is_dir()), None)
            if path is None:
                known = ", ".join(path.name for path in self.list()) or "none"
                raise UserError(f"no checkpoint {name}; {self.folder} has: {known}.")
            if damage := find_damage(path):
                raise UserError(f"{path} is damaged: {damage}; take another one, or `latest`.")
        if path is not None:
            step = self._read_state(path)["step"]
        later = [checkpoint for checkpoint in self.list() if checkpoint_step(checkpoint) > step]
        for checkpoint in later:
            set_aside(checkpoint)
        if later:
            lines.append(f"set aside, as .set_aside: {', '.join(checkpoint.name for checkpoint in later)}")
        return path, lines

    def _read_state(self, path: Path) -> dict[str, Any]:
        """The trainer's state; a `UserError` if it is none, of an older version, or of another model or LoRA."""
        state = _read_json(path / STATE_NAME)
        if not isinstance(state, dict) or type(state.get("step")) is not int or state["step"] < 0:
            raise UserError(f"{path / STATE_NAME} is no state of a run.")
        written = state.pop("format", None)
        if written != FORMAT:
            by = "version 0.1.0" if written is None else f"another version (format {one_line(written)})"
            raise UserError(
                f"{path} was written by {by}, whose states are not read here: a new run from its LoRA is "
                f"--init_lora {path}, with another output_dir."
            )
        saved = state.pop("identity", None)
        if not isinstance(saved, dict):
            raise UserError(f"{path / STATE_NAME} is no state of a run.")
        for name, value in self.identity.items():
            there = saved.get(name)
            if there != value:
                raise UserError(
                    f"{path} is of another run: {name} is {_listing(there)} there and {_listing(value)} here. "
                    "A new run from its LoRA is --init_lora."
                )
        return state

    def load(self, path: Path, like: dict[str, Any]) -> dict[str, Any]:
        """Restores adapters and optimizer, and returns the trainer's `state`; every process calls it.

        Args:
            like: a state of the form that it must have.

        Raises:
            UserError: in every process, if something is not what [`~Checkpoints.save`] wrote.
        """
        parameters = trained_parameters(self.transformer)
        with raise_together(), as_user_error(f"cannot resume from {path}"):
            state = self._read_state(path)
            with as_user_error(f"{path / STATE_NAME} is no state of this run"):
                check_form(state, like)
            with as_user_error(f"{path / OPTIMIZER_NAME} does not fit this run"):
                moments = safetensors.torch.load_file(path / OPTIMIZER_NAME)
                check_optimizer_tensors(moments, parameters)
        # As in `save`: shards are handed out together.
        with contextlib.nullcontext() if is_sharded() else raise_together(), as_user_error(f"cannot use {path}"):
            for adapter in self.transformer.peft_config:
                load_adapter(self.transformer, path, adapter)
            load_optimizer(moments, parameters, self.optimizer)
        return state


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error


def _listing(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
