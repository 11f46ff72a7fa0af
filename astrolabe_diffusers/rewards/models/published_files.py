"""Files of published reward models: from a folder, a file or the Hub."""

from __future__ import annotations

import ast
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import nn

from ...errors import one_line
from ...layouts.tensor_files import load_tensors, misfits, select_weights


def fetch(source: str, patterns: list[str]) -> Path:
    """The folder or file `source`, or that Hub repository downloaded, as far as its files match `patterns`."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if path.is_absolute() or len(path.parts) != 2 or path.parts[0].startswith("."):
        raise ValueError(f"no such file or folder: {source}")
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except Exception as error:  # the client has a class for each way to fail
        reason = one_line(error)
        raise ValueError(f"{source} is no file or folder here, and the Hub did not give it: {reason}") from None


def read_weights(files: list[Path]) -> dict[str, torch.Tensor]:
    """The tensors of all files, memory-mapped."""
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors |= select_weights(load_tensors(file), ("model", "state_dict", "module"))
    return tensors


def fill(model: nn.Module, weights: dict[str, torch.Tensor], problem: str, remark: str = ""):
    """Puts `weights` into a model; a `ValueError` of `problem`, which of them do not fit, and `remark`, if some do
    not."""
    if found := misfits(weights, {name: tensor.shape for name, tensor in model.state_dict().items()}):
        raise ValueError(f"{problem}: {found}.{remark}")
    model.load_state_dict(weights, assign=True)


def read_template(model: str, files: list[Path], names: tuple[str, ...], remedy: str) -> str:
    """What the first of these Python files that is there assigns to `names` at its top level, strings in a row; it is
    not run."""
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        where = " or ".join(map(str, files))
        raise ValueError(f"{model} needs the text it was trained with, and {where} does not exist: {remedy}")
    found = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            found |= {target.id: node.value.value for target in node.targets if isinstance(target, ast.Name)}
    missing = [name for name in names if not isinstance(found.get(name), str)]
    if missing:
        raise ValueError(f"{file} assigns no text to {', '.join(missing)}.")
    return "".join(found[name] for name in names)
