"""Published checkpoints of causal Wan2.1 models, in their original layout."""

import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..files.text import parse_json
from .experts import MEMORY_TRANSFORMER, TRANSFORMER, split_checkpoint
from .published_models import PublishedModel
from .tensor_files import load_tensors, misfits, select_weights


# Wrappers (FSDP, activation checkpointing, torch.compile) leave these anywhere in a name, modules at its beginning.
WRAPPERS = re.compile(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.")
_LEADING = re.compile(r"^(?:(?:module|model|diffusion_model|transformer|pipe|dit|net)\.)+")

# Entries of a training checkpoint that may be the generator.
_ENTRIES = ("generator_ema", "generator", "model", "state_dict", "module")

# Beside an 8-bit weight, in the files of ComfyUI, Kijai and lightx2v: what it is multiplied by; scales of activations,
# which are not quantised here; which kind of numbers it is, as JSON.
_WEIGHT_SCALES = (".scale_weight", ".weight_scale")
_INPUT_SCALES = (".scale_input", ".input_scale")
_FORMAT = ".comfy_quant"
_FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")
_SCALED_FILE = "scaled_fp8"

# Names of Wan2.1's modules and tables in the original files and in diffusers, of a block and of the rest. No tensor
# changes. Wan's norm3 is diffusers' norm2; Wan's norm1 and norm2 have no parameters.
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
IN_BLOCK = {f"self_attn.{old}": f"attn1.{new}" for old, new in _ATTENTION.items()}
IN_BLOCK |= {f"cross_attn.{old}": f"attn2.{new}" for old, new in _ATTENTION.items()}
IN_BLOCK |= {"norm3": "norm2", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2", "modulation": "scale_shift_table"}
OUTSIDE = {f"{what}_embedding.0": f"condition_embedder.{what}_embedder.linear_1" for what in ("text", "time")}
OUTSIDE |= {f"{what}_embedding.2": f"condition_embedder.{what}_embedder.linear_2" for what in ("text", "time")}
OUTSIDE |= {"time_projection.1": "condition_embedder.time_proj"}
OUTSIDE |= {"head.head": "proj_out", "head.modulation": "scale_shift_table"}

# (width, layers) of the models that checkpoints are published for.
_KNOWN = {(1536, 30): "Wan2.1 1.3B", (5120, 40): "Wan2.1 14B", (3072, 30): "Wan2.2 5B (LongLive 2.0)"}
# What files are that have a name with one of these in it.
_OTHER_FILES = {
    r"\.base_layer\.": "a model with a LoRA beside its weights, as PEFT keeps it: take the file with both merged",
    r"\.lora_|\.diff(_b)?$": "a LoRA: merge it into its model's file with --lora",
    r"^vace_": "VACE",
    r"^img_emb\.|_img\.": "a model of images to videos, with an encoder of images",
    r"^encoder\.block\.|^shared\.|^token_embedding\.": "a text encoder",
    r"^(encoder|decoder)\.": "an autoencoder or a decoder of latents",
}


def diffusers_name(name: str) -> str:
    """The name of a module, a parameter or a LoRA matrix of one in diffusers' Wan; other names stay as they are."""
    name = _LEADING.sub("", WRAPPERS.sub("", name))
    block = re.match(r"blocks\.\d+\.|", name)[0]
    rest = name.removeprefix(block)
    for old, new in (IN_BLOCK if block else OUTSIDE).items():
        if f"{rest}.".startswith(f"{old}."):
            return block + new + rest.removeprefix(old)
    return name


@dataclass
class OriginalWeights:
    """The generator of a checkpoint, under the names of [`CausalWanTransformer3DModel`]."""

    tensors: dict[str, torch.Tensor]  # as they are stored
    scales: dict[str, torch.Tensor]  # what an 8-bit tensor is to be multiplied by: one number, or one for each row

    @cached_property
    def _is_8_bit(self) -> bool:
        return any(tensor.dtype.itemsize == 1 for tensor in self.tensors.values())

    def dtype(self, name: str) -> torch.dtype:
        """Of a value. In a file with 8-bit weights all are float32, and exact."""
        return torch.float32 if self._is_8_bit or name in self.scales else self.tensors[name].dtype

    def value(self, name: str) -> torch.Tensor:
        tensor = self.tensors[name].to(self.dtype(name))
        return tensor * self.scales[name].float() if name in self.scales else tensor


def load_original_experts(
    checkpoint: str | Path | dict[str, Any],
    weights: str | tuple[str, ...] = (),
    recipe: PublishedModel | None = None,
    map_files: bool = True,
) -> dict[str, OriginalWeights]:
    """
    By component, the generator of a file or folder, as [`load_tensors`] takes it, or of what it holds: the first of
    the entries `weights` that is there, or where any is there of those of `recipe`, the published model that it is.

    Raises:
        ValueError: it is no checkpoint; `weights` are not there, or neither they nor a recipe say which of several
            generators is meant; it has tensors that are no weights.
    """
    if not isinstance(checkpoint, dict):
        checkpoint = load_tensors(checkpoint, map_files)
    tensors = _select_generator(checkpoint, weights, recipe.weights if recipe else ())
    if not tensors:
        raise ValueError("this checkpoint holds no tensors.")
    parts = split_checkpoint(tensors).items()
    return {name: OriginalWeights(*_split_scales(to_diffusers(part))) for name, part in parts}


def load_original_weights(
    checkpoint: str | Path | dict[str, Any],
    weights: str | tuple[str, ...] = (),
    recipe: PublishedModel | None = None,
    map_files: bool = True,
) -> OriginalWeights:
    """As [`load_original_experts`], of a checkpoint of a single model; a `ValueError` if it holds two experts."""
    experts = load_original_experts(checkpoint, weights, recipe, map_files)
    if MEMORY_TRANSFORMER in experts:
        raise ValueError(
            "this checkpoint holds two transformers, one that denoises and one that writes the cache: `astrolabe "
            "convert` makes a pipeline of both, for CausalWanPipeline.from_pretrained."
        )
    return experts[TRANSFORMER]


def _select_generator(
    checkpoint: dict[str, Any], weights: str | tuple[str, ...], preferred: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    weights = (weights,) if isinstance(weights, str) else tuple(weights)
    entries = [name for name, value in checkpoint.items() if isinstance(value, dict)]
    if weights and not set(weights) & set(entries):
        there = f"there are {', '.join(entries)}" if entries else "its tensors have no entries: leave `weights` out"
        raise ValueError(f"this checkpoint has no entry {' or '.join(weights)}; {there}.")
    possible = [name for name in _ENTRIES if name in entries]
    if not weights and not set(preferred) & set(entries) and len(possible) > 1:
        raise ValueError(
            f"this checkpoint holds {' and '.join(possible)}: say which is meant with `weights`, or with `recipe` "
            "which published model it is."
        )
    return select_weights(checkpoint, weights or (*preferred, *_ENTRIES))


def _split_scales(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights and the scales of those in 8 bits; what else such files hold, and counters of a training, are left."""
    weights, scales = {}, {}
    for name, tensor in tensors.items():
        module, dot, last = name.rpartition(".")
        weight, what = f"{module}.weight", dot + last
        if what == _FORMAT:
            kind = parse_json(bytes(tensor.tolist()), name)["format"]
            if kind not in _FORMATS:
                raise ValueError(f"{weight} is quantised as {kind}; what is supported is {', '.join(_FORMATS)}.")
        elif what in _WEIGHT_SCALES and weight in tensors:
            count, rows = tensor.numel(), tensors[weight].shape[:1].numel()
            if count not in (1, rows):
                raise ValueError(f"{weight} has {count} scales: one is supported, or one for each of {rows} rows.")
            scales[weight] = tensor.reshape(-1, *[1] * (tensors[weight].ndim - 1))
        elif what in _INPUT_SCALES and weight in tensors or name == _SCALED_FILE:
            continue
        elif tensor.is_floating_point() or tensor.numel() != 1:
            weights[name] = tensor
    for name, tensor in weights.items():
        if not tensor.is_floating_point() and name not in scales:
            raise ValueError(f"{name} is of {str(tensor.dtype).removeprefix('torch.')}, which is no weight.")
    return weights, scales


def to_diffusers(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, as they are, under the names of [`CausalWanTransformer3DModel`]."""
    converted = {}
    for name, tensor in weights.items():
        new = diffusers_name(name)
        if new in converted:
            raise ValueError(f"two tensors of this checkpoint mean {new}; the second is {name}.")
        converted[new] = tensor
    return converted


def describe(weights: dict[str, torch.Tensor]) -> str:
    """Which model tensors in Diffusers layout look like, in words."""
    for mark, words in _OTHER_FILES.items():
        if any(re.search(mark, name) for name in weights):
            return words
    layers = _num_layers(weights)
    if not layers or "patch_embedding.weight" not in weights:
        return "no Wan transformer"
    width = len(weights["patch_embedding.weight"])
    words = f"width {width}, {layers} layers"
    return f"{_KNOWN[width, layers]} ({words})" if (width, layers) in _KNOWN else f"a Wan transformer of {words}"


def infer_config(weights: dict[str, torch.Tensor], attention_head_dim: int = 128) -> dict[str, Any]:
    """The sizes of the transformer that tensors in Diffusers layout belong to; those of the heads, no shape tells."""
    try:
        shape = weights["patch_embedding.weight"].shape
        width, patch_size = shape[0], tuple(shape[2:])
        if width % attention_head_dim:
            raise ValueError(
                f"a width of {width} is no whole number of heads of {attention_head_dim}: give "
                "`attention_head_dim` or `config`."
            )
        return {
            "num_attention_heads": width // attention_head_dim,
            "attention_head_dim": attention_head_dim,
            "num_layers": _num_layers(weights),
            "in_channels": shape[1],
            "out_channels": weights["proj_out.weight"].shape[0] // math.prod(patch_size),
            "patch_size": patch_size,
            "text_dim": weights["condition_embedder.text_embedder.linear_1.weight"].shape[1],
            "freq_dim": weights["condition_embedder.time_embedder.linear_1.weight"].shape[1],
            "ffn_dim": weights["blocks.0.ffn.net.0.proj.weight"].shape[0],
        }
    except KeyError as error:
        raise ValueError(
            f"this is no Wan transformer: it has no {error.args[0]}. It looks like {describe(weights)}."
        ) from None
    except IndexError:
        raise ValueError("this is no Wan transformer: its tensors have other shapes.") from None


def check_fits(weights: dict[str, torch.Tensor], shapes: dict[str, torch.Size]) -> None:
    """Raise a one-line `ValueError` that names which tensors in Diffusers layout are missing, unexpected or not of the
    transformer's `shapes`, and the likely model."""
    if found := misfits(weights, shapes):
        raise ValueError(f"this checkpoint does not fit: {found}. It looks like {describe(weights)}.")


def _num_layers(weights: dict[str, torch.Tensor]) -> int:
    numbers = (re.match(r"blocks\.(\d+)\.", name) for name in weights)
    return 1 + max((int(number[1]) for number in numbers if number), default=-1)
