"""Published checkpoints of causal Wan2.1 models, in their original layout."""

from __future__ import annotations

import json
import math
import mmap
import pickle
import re
import struct
import warnings
from pathlib import Path
from typing import Any

import torch


# Wrappers (FSDP, activation checkpointing, torch.compile) leave these anywhere in a name, modules at its beginning.
_WRAPPERS = re.compile(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.")
_LEADING = re.compile(r"^(?:(?:module|model|diffusion_model)\.)+")

# Original Wan2.1 names to those of diffusers. No tensor changes. Wan's norm3 is diffusers' norm2; Wan's norm1 and
# norm2 have no parameters.
_RENAMES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
        (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
        (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
        (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
        (r"^time_projection\.1\.", "condition_embedder.time_proj."),
        (r"^(blocks\.\d+)\.self_attn\.([qkv])\.", r"\1.attn1.to_\2."),
        (r"^(blocks\.\d+)\.self_attn\.o\.", r"\1.attn1.to_out.0."),
        (r"^(blocks\.\d+)\.self_attn\.norm_([qk])\.", r"\1.attn1.norm_\2."),
        (r"^(blocks\.\d+)\.cross_attn\.([qkv])\.", r"\1.attn2.to_\2."),
        (r"^(blocks\.\d+)\.cross_attn\.o\.", r"\1.attn2.to_out.0."),
        (r"^(blocks\.\d+)\.cross_attn\.norm_([qk])\.", r"\1.attn2.norm_\2."),
        (r"^(blocks\.\d+)\.norm3\.", r"\1.norm2."),
        (r"^(blocks\.\d+)\.ffn\.0\.", r"\1.ffn.net.0.proj."),
        (r"^(blocks\.\d+)\.ffn\.2\.", r"\1.ffn.net.2."),
        (r"^(blocks\.\d+)\.modulation$", r"\1.scale_shift_table"),
        (r"^head\.head\.", "proj_out."),
        (r"^head\.modulation$", "scale_shift_table"),
    )
]

_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# (width, layers) of the models that checkpoints are published for.
_KNOWN = {(1536, 30): "Wan2.1 1.3B", (5120, 40): "Wan2.1 14B"}


def diffusers_name(name: str) -> str:
    """The name of a parameter, or of a LoRA matrix of it, in diffusers' Wan; other names stay as they are."""
    name = _LEADING.sub("", _WRAPPERS.sub("", name))
    for pattern, replacement in _RENAMES:
        name, count = pattern.subn(replacement, name)
        if count:
            break
    return name


def load_tensors(path: str | Path) -> dict[str, Any]:
    """
    What a `.safetensors`, `.pt`, `.pth` or `.bin` file holds, memory-mapped: tensors are read when they are used.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint, or one whose loading would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            return _map_safetensors(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds more than tensors: loading it would run code from the file, which is refused."
        ) from None
    except (ValueError, KeyError, RuntimeError, EOFError, struct.error) as error:
        raise ValueError(f"{path} is no readable checkpoint: {str(error).splitlines()[0]}") from None


def _map_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file on a read-only map. That of `safetensors` is writable, and for such a map Linux wants as
    much memory as the file is long: one of 28 GB would not load on a machine of 24."""
    with open(path, "rb") as file:
        (header_size,) = struct.unpack("<Q", file.read(8))
        if header_size > path.stat().st_size:
            raise ValueError("it has no safetensors header")
        header = json.loads(file.read(header_size))
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    header.pop("__metadata__", None)
    tensors = {}
    with warnings.catch_warnings():
        # Nobody writes to them.
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        for name, info in header.items():
            begin = 8 + header_size + info["data_offsets"][0]
            dtype, count = _SAFETENSORS_DTYPES[info["dtype"]], math.prod(info["shape"])
            tensors[name] = torch.frombuffer(buffer, dtype=dtype, count=count, offset=begin).view(info["shape"])
    return tensors


def select_weights(checkpoint: dict[str, Any], keys: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """
    The generator's tensors out of a training checkpoint.

    Args:
        checkpoint: a flat dict of tensors, or dicts by name (`generator`, `generator_ema`, `critic`, ...).
        keys: names in the order of preference; the first that is there is taken.
    """
    if all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        return checkpoint
    for key in keys:
        if isinstance(checkpoint.get(key), dict):
            return checkpoint[key]
    raise ValueError(f"this checkpoint holds {', '.join(checkpoint)}, and none of {', '.join(keys)}.")


def to_diffusers(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under the names of [`CausalWanTransformer3DModel`]; the tensors themselves stay as they are."""
    converted = {}
    for name, tensor in weights.items():
        new = diffusers_name(name)
        if new in converted:
            raise ValueError(f"two tensors of this checkpoint mean {new}; the second is {name}.")
        converted[new] = tensor
    return converted


def describe(weights: dict[str, torch.Tensor]) -> str:
    """Which model tensors in Diffusers layout look like, in words."""
    width, layers = _width(weights), _num_layers(weights)
    if not width or not layers:
        return "no Wan transformer"
    words = f"width {width}, {layers} layers"
    return f"{_KNOWN[width, layers]} ({words})" if (width, layers) in _KNOWN else f"a Wan transformer of {words}"


def infer_config(weights: dict[str, torch.Tensor], attention_head_dim: int = 128) -> dict[str, Any]:
    """The sizes of the transformer that tensors in Diffusers layout belong to; those of the heads, no shape tells."""
    width, layers = _width(weights), _num_layers(weights)
    try:
        return {
            "num_attention_heads": width // attention_head_dim,
            "attention_head_dim": attention_head_dim,
            "num_layers": layers,
            "in_channels": weights["patch_embedding.weight"].shape[1],
            "out_channels": weights["proj_out.weight"].shape[0] // weights["patch_embedding.weight"].shape[2:].numel(),
            "patch_size": tuple(weights["patch_embedding.weight"].shape[2:]),
            "text_dim": weights["condition_embedder.text_embedder.linear_1.weight"].shape[1],
            "freq_dim": weights["condition_embedder.time_embedder.linear_1.weight"].shape[1],
            "ffn_dim": weights["blocks.0.ffn.net.0.proj.weight"].shape[0],
        }
    except KeyError as error:
        raise ValueError(f"this is no Wan transformer: it has no {error.args[0]}.") from None


def misfits(weights: dict[str, torch.Tensor], shapes: dict[str, torch.Size]) -> str:
    """In words, which of `weights` are missing, unexpected or of another shape than `shapes`; empty if all fit."""
    problems = {
        "missing": [name for name in shapes if name not in weights],
        "unexpected": [name for name in weights if name not in shapes],
        "of another shape": [
            f"{name} {tuple(weights[name].shape)} for {tuple(shape)}"
            for name, shape in shapes.items()
            if name in weights and weights[name].shape != shape
        ],
    }
    found = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in problems.items()
        if names
    ]
    return "; ".join(found)


def check_fits(weights: dict[str, torch.Tensor], shapes: dict[str, torch.Size]) -> None:
    """Raise a one-line `ValueError` that names what is missing, unexpected or of another shape, and the likely model.

    Args:
        weights: tensors in Diffusers layout.
        shapes: what the transformer has.
    """
    if found := misfits(weights, shapes):
        raise ValueError(f"this checkpoint does not fit: {found}. It looks like {describe(weights)}.")


def _width(weights: dict[str, torch.Tensor]) -> int:
    weight = weights.get("patch_embedding.weight")
    return 0 if weight is None else weight.shape[0]


def _num_layers(weights: dict[str, torch.Tensor]) -> int:
    return 1 + max((int(name.split(".")[1]) for name in weights if name.startswith("blocks.")), default=-1)
