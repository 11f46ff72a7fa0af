"""The checkpoints of a run: written, found again, kept, and set aside."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file

from ..distributed.agreement import is_first_process, raise_together
from ..distributed.sharding import together
from ..errors import UserError, as_user_error
from ..files.output_folder import checkpoint_step, list_checkpoints, set_aside
from ..files.writing import PARTIAL, find_damage, seal, to_disk
from .adapter_files import load_adapter, save_adapter
from .config import OnlineConfig
from .states import (
    STATE_NAME,
    check_form,
    check_optimizer_tensors,
    load_optimizer,
    optimizer_tensors,
    read_state,
    trained_parameters,
    write_state,
)


OPTIMIZER_NAME = "optimizer.safetensors"


class Checkpoints:
    """Checkpoints of a run, each a folder `<output_dir>/checkpoints/checkpoint-N`.

    It holds every adapter, the optimizer, `config.yaml` and `trainer_state.json`, all of it tensors, JSON and YAML,
    and can be given to `pipe.load_lora_weights`; no states of random generators, for every epoch seeds them anew. It
    is written under another name and renamed when it is complete and on the disk; `files.json` tells whether it still
    is.

    Args:
        transformer: the unwrapped transformer.
        optimizer: AdamW over the current policy's parameters, prepared or not.
        config: `output_dir`, `checkpoints_total_limit` (the oldest go), and all that is saved as `config.yaml`.
        identity: from `policy_identity`, before the model was prepared.
    """

    def __init__(
        self,
        transformer: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        config: OnlineConfig,
        identity: dict[str, Any],
    ):
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
        final, is_first = self.path(step), is_first_process()
        partial = final.with_name(final.name + PARTIAL)
        with raise_together(), as_user_error(f"cannot write {partial}"):
            if is_first:
                partial.mkdir(parents=True)
        with together(), as_user_error(f"cannot write {partial}"):
            for adapter in self.transformer.peft_config:
                save_adapter(self.transformer, partial, adapter)
            moments = optimizer_tensors(trained_parameters(self.transformer), self.optimizer)
            if is_first:
                save_file(moments, partial / OPTIMIZER_NAME)
        with raise_together(), as_user_error(f"cannot write {final}"):
            if is_first:
                self.config.save(partial / "config.yaml")
                write_state(partial, state, self.identity)
                seal(partial)
                partial.rename(final)
                to_disk(self.folder)
                self._remove_oldest()
        return final

    def _remove_oldest(self):
        if limit := self.config.checkpoints_total_limit:
            for path in self.list()[:-limit]:
                # First the name: a kill in the middle must not leave half a checkpoint.
                shutil.rmtree(path.rename(path.with_name(path.name + PARTIAL)))

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
        path, lines = None, []
        with raise_together(), as_user_error(f"cannot use {self.folder}"):
            if is_first_process():
                for left_over in self.folder.glob(f"checkpoint-*{PARTIAL}"):
                    shutil.rmtree(left_over)
                if name == "latest":
                    path, lines = self._newest_whole()
                elif name is not None:
                    path = self._named(name)
                step = -1 if path is None else read_state(path, self.identity)["step"]
                later = [checkpoint for checkpoint in self.list() if checkpoint_step(checkpoint) > step]
                for checkpoint in later:
                    set_aside(checkpoint)
                if later:
                    lines.append(f"set aside, as .set_aside: {', '.join(checkpoint.name for checkpoint in later)}")
        return tuple(broadcast_object_list([path, lines]))

    def _newest_whole(self) -> tuple[Path | None, list[str]]:
        lines = []
        for path in reversed(self.list()):
            damage = find_damage(path)
            if damage is None:
                return path, lines
            lines.append(f"{path.name} is damaged: {damage}; taking the one before")
        return None, lines

    def _named(self, name: str) -> Path:
        path = next((path for path in (Path(name), self.folder / name) if path.is_dir()), None)
        if path is None:
            known = ", ".join(path.name for path in self.list()) or "none"
            raise UserError(f"no checkpoint {name}; {self.folder} has: {known}.")
        if damage := find_damage(path):
            raise UserError(f"{path} is damaged: {damage}; take another one, or `latest`.")
        return path

    def load(self, path: Path, like: dict[str, Any]) -> dict[str, Any]:
        """Restores adapters and optimizer, and returns the trainer's `state`; every process calls it.

        Args:
            like: a state of the form that it must have.

        Raises:
            UserError: in every process, if something is not what [`~Checkpoints.save`] wrote.
        """
        parameters = trained_parameters(self.transformer)
        with raise_together(), as_user_error(f"cannot resume from {path}"):
            state = read_state(path, self.identity)
            with as_user_error(f"{path / STATE_NAME} is no state of this run"):
                check_form(state, like)
            with as_user_error(f"{path / OPTIMIZER_NAME} does not fit this run"):
                moments = load_file(path / OPTIMIZER_NAME)
                check_optimizer_tensors(moments, parameters)
        with together(), as_user_error(f"cannot use {path}"):
            for adapter in self.transformer.peft_config:
                load_adapter(self.transformer, path, adapter)
            load_optimizer(moments, parameters, self.optimizer)
        return state
