"""LoRA files and checkpoints of a run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from ..pipelines.pipeline_causal_wan import CausalWanPipeline
from .errors import UserError, as_user_error
from .policies import CURRENT, OLD


# The current policy's file has the name that `load_lora_weights(folder)` looks for.
WEIGHT_NAMES = {CURRENT: "pytorch_lora_weights.safetensors", OLD: "pytorch_lora_weights_old.safetensors"}
STATE_NAME = "trainer_state.json"
PREFIX = "transformer."


def save_adapter(
    transformer: torch.nn.Module, folder: str | Path, adapter: str = CURRENT, weight_name: str | None = None
):
    """Writes an adapter in Diffusers format, with its LoraConfig in the header so that alpha survives."""
    CausalWanPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer, adapter_name=adapter),
        weight_name=weight_name or WEIGHT_NAMES[adapter],
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
    set_peft_model_state_dict(transformer, loaded, adapter_name=adapter)


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    paths = (Path(output_dir) / "checkpoints").glob("checkpoint-*")
    steps = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in paths}
    return sorted((path for path, match in steps.items() if match), key=lambda path: int(steps[path][1]))


class Checkpoints:
    """Checkpoints of a run, each a folder `<output_dir>/checkpoints/checkpoint-N`.

    It holds both adapters, the optimizer, the schedule, random states and `trainer_state.json`, and can be given to
    `pipe.load_lora_weights`. A checkpoint is written under another name and renamed when complete.

    Args:
        accelerator: with model, optimizer and schedule prepared.
        transformer: the unwrapped transformer.
        output_dir: folder of the run.
        total_limit: how many are kept; the oldest go.
    """

    def __init__(
        self, accelerator: Accelerator, transformer: torch.nn.Module, output_dir: str | Path, total_limit: int | None
    ):
        self.accelerator = accelerator
        self.transformer = transformer
        self.folder = Path(output_dir) / "checkpoints"
        self.total_limit = total_limit
        accelerator.register_save_state_pre_hook(self._save_adapters)
        accelerator.register_load_state_pre_hook(self._load_adapters)

    def _save_adapters(self, models: list, weights: list, folder: str):
        weights.clear()  # the frozen base is not part of a checkpoint
        if self.accelerator.is_main_process:
            for adapter in WEIGHT_NAMES:
                save_adapter(self.transformer, folder, adapter)

    def _load_adapters(self, models: list, folder: str):
        models.clear()
        for adapter in WEIGHT_NAMES:
            load_adapter(self.transformer, folder, adapter)

    def list(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return list_checkpoints(self.folder.parent)

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Writes checkpoint `step`; every process calls it. `state` is what the trainer wants back, JSON values."""
        final, partial = self.folder / f"checkpoint-{step}", self.folder / f"checkpoint-{step}.partial"
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (partial / STATE_NAME).write_text(json.dumps(state))
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            if self.total_limit:
                for path in self.list()[: -self.total_limit]:
                    shutil.rmtree(path)
        self.accelerator.wait_for_everyone()
        return final

    def find(self, name: str) -> Path | None:
        """The folder of `"latest"`, `None` if there is none yet, or of a path or `checkpoint-N`."""
        if name == "latest":
            return self.list()[-1] if self.list() else None
        for path in (Path(name), self.folder / name):
            if (path / STATE_NAME).is_file():
                return path
        known = ", ".join(path.name for path in self.list()) or "none"
        raise UserError(f"no checkpoint {name}; {self.folder} has: {known}.")

    def load(self, path: Path) -> dict[str, Any]:
        """Restores adapters, optimizer, schedule and random states, and returns the trainer's `state`."""
        with as_user_error(f"cannot resume from {path}"):
            self.accelerator.load_state(str(path))
            return json.loads((path / STATE_NAME).read_text())
