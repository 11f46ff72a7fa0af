"""LoRA files of published models, in peft's own layout."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig

from .original_checkpoints import describe, diffusers_name, select_weights
from .tensor_files import load_tensors


_MATRIX = re.compile(r"^(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.[^.]+)?\.weight$")
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass
class OriginalLora:
    """
    A LoRA under diffusers' names.

    Args:
        modules: by module, A `(rank, in_features)` and B `(out_features, rank)`.
        alpha: `lora_alpha`, None where the file does not say: then it is the rank.
    """

    modules: dict[str, tuple[torch.Tensor, torch.Tensor]]
    alpha: float | None

    @property
    def rank(self) -> int:
        return next(iter(self.modules.values()))[0].shape[0]

    def delta(self, module: str) -> torch.Tensor:
        """What the LoRA adds to a module's weight, float32."""
        a, b = (matrix.float() for matrix in self.modules[module])
        return (self.alpha or self.rank) / self.rank * (b @ a)

    def check_fits(self, weights: dict[str, torch.Tensor]) -> None:
        """Raise a one-line `ValueError` if it is made for another model than these tensors in Diffusers layout."""
        for module, (a, b) in self.modules.items():
            weight = weights.get(f"{module}.weight")
            if weight is None:
                raise ValueError(f"this LoRA changes {module}, which {describe(weights)} does not have.")
            if weight.shape != (b.shape[0], a.shape[1]):
                raise ValueError(
                    f"this LoRA is another model's: at {module} it is {b.shape[0]} x {a.shape[1]}, in "
                    f"{describe(weights)} that is {' x '.join(map(str, weight.shape))}."
                )

    def config(self) -> LoraConfig:
        return LoraConfig(
            r=self.rank, lora_alpha=self.alpha or self.rank, target_modules=sorted(self.modules), lora_dropout=0.0
        )

    def state_dict(self) -> dict[str, torch.Tensor]:
        """As `save_lora_weights(transformer_lora_layers=...)` takes it."""
        return {
            f"{module}.lora_{letter}.weight": matrix.contiguous()
            for module, matrices in self.modules.items()
            for letter, matrix in zip("AB", matrices)
        }


def load_original_lora(path: str | Path) -> OriginalLora:
    """
    A LoRA as peft or LongLive's trainer wrote it.

    Args:
        path: a file (LongLive's `lora.pt`, flat or with an entry `generator_lora`), or a folder with
            `adapter_model.safetensors` or `.bin`. An `adapter_config.json` beside the file gives alpha.

    Raises:
        ValueError: the file holds no LoRA, or one that has no plain A and B of one rank.
    """
    path = Path(path)
    if path.is_dir():
        files = [path / name for name in _ADAPTER_FILES if (path / name).is_file()]
        if not files:
            raise ValueError(f"{path} holds none of {', '.join(_ADAPTER_FILES)}.")
        path = files[0]
    matrices: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in select_weights(load_tensors(path), ("generator_lora",)).items():
        match = _MATRIX.match(key)
        if match is None:
            raise ValueError(f"{path} is no LoRA of linear layers: it holds {key}.")
        module = diffusers_name(match[1] + ".").removesuffix(".")
        matrices.setdefault(module, {})[match[2]] = tensor
    incomplete = [module for module, pair in matrices.items() if len(pair) < 2]
    if incomplete or not matrices:
        raise ValueError(f"{path} is no LoRA: " + (f"{incomplete[0]} has A or B only." if incomplete else "empty."))
    modules = {module: (pair["A"], pair["B"]) for module, pair in matrices.items()}
    ranks = {a.shape[0] for a, _ in modules.values()} | {b.shape[1] for _, b in modules.values()}
    if len(ranks) > 1:
        raise ValueError(f"{path} has layers of different ranks: {', '.join(map(str, sorted(ranks)))}.")
    config = path.parent / "adapter_config.json"
    alpha = json.loads(config.read_text())["lora_alpha"] if config.is_file() else None
    return OriginalLora(modules, alpha)
