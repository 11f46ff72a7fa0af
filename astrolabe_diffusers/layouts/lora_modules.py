"""LoRAs of Wan2.1 in any layout that they are published in; docs/lora_files.md lists them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mode
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from .experts import split_lora
from .lora_files import find_lora_file, read_lora_file
from .lora_keys import parse_key, trainer_names
from .wan_checkpoints import describe


# Starts of peft that leave the base weights as they are. From others (PiSSA, OLoRA, ...) A and B belong to other ones.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Fields of peft's config that make W + scale B A something else. DoRA's is told by its tensors.
_VARIANTS = (
    *("alora_invocation_tokens", "use_qalora", "monteclora_config", "use_bdlora", "arrow_config", "kasa_config"),
    *("velora_config", "layer_replication", "target_parameters", "trainable_token_indices"),
)


@dataclass
class LoraModule:
    """A module's weight becomes W + alpha / rank * B A, and with DoRA its rows then get the lengths `magnitude`."""

    a: torch.Tensor  # (rank, in_features), or (rank, in_channels, *kernel) of a convolution
    b: torch.Tensor  # (out_features, rank), or (out_channels, rank, 1, 1, 1)
    alpha: float
    magnitude: torch.Tensor | None = None  # (out_features,)

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @classmethod
    def of_full_rank(cls, diff: torch.Tensor) -> "LoraModule":
        """A LoRA that adds just this to a weight."""
        matrix = diff.flatten(1)
        out_size, in_size = matrix.shape
        if in_size <= out_size:
            a, b = torch.eye(in_size, dtype=diff.dtype), matrix
        else:
            a, b = matrix, torch.eye(out_size, dtype=diff.dtype)
        return cls(a.view(-1, *diff.shape[1:]), b.view(*b.shape, *[1] * (diff.ndim - 2)), alpha=len(a))

    @classmethod
    def of_zeros(cls, weight: torch.Tensor) -> "LoraModule":
        """A LoRA of rank 1 that changes nothing."""
        shape = (weight.shape[0], 1, *[1] * (weight.ndim - 2))
        return cls(torch.zeros(1, *weight.shape[1:]), torch.zeros(shape), alpha=1)

    def with_scale_one(self) -> "LoraModule":
        """The same LoRA with the scale in B."""
        return self if self.scale == 1 else replace(self, b=self.scale * self.b.float(), alpha=self.rank)

    def padded(self, rank: int) -> "LoraModule":
        """The same LoRA of at least this rank, filled up with zeros."""
        if (more := rank - self.rank) <= 0:
            return self
        a = torch.cat([self.a, self.a.new_zeros(more, *self.a.shape[1:])])
        b = torch.cat([self.b, self.b.new_zeros(len(self.b), more, *self.b.shape[2:])], dim=1)
        return replace(self, a=a, b=b, alpha=self.scale * rank)

    def add(self, diff: torch.Tensor) -> "LoraModule":
        """The LoRA that adds this to the weight too."""
        one, two = self.with_scale_one(), LoraModule.of_full_rank(diff)
        a = torch.cat([one.a.float(), two.a.float()])
        return LoraModule(a, torch.cat([one.b.float(), two.b.float()], dim=1), alpha=len(a))

    def merge(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight with the LoRA in it, float32."""
        delta = self.b.float().flatten(1) @ self.a.float().flatten(1)
        weight = weight.float() + self.scale * delta.view(weight.shape)
        if self.magnitude is not None:
            length = weight.flatten(1).norm(dim=1)
            weight = weight * (self.magnitude.float() / length).view(-1, *[1] * (weight.ndim - 1))
        return weight


@dataclass
class OriginalLora:
    """A LoRA under diffusers' names."""

    modules: dict[str, LoraModule]
    diffs: dict[str, torch.Tensor]  # by the name of a parameter, what is added to it as it is
    config: dict[str, Any]  # peft's, as far as it came with the file

    def changes(self, name: str) -> bool:
        return name in self.diffs or name.removesuffix(".weight") in self.modules

    def merge(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A parameter with the LoRA in it, float32."""
        module = self.modules.get(name.removesuffix(".weight"))
        weight = weight.float() if module is None else module.merge(weight)
        return weight + self.diffs[name].float() if name in self.diffs else weight

    def check_fits(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Raise a one-line `ValueError` if it is made for another model than these tensors in Diffusers layout."""
        shapes = [(f"{name}.weight", (m.b.shape[0], *m.a.shape[1:])) for name, m in self.modules.items()]
        model = describe(weights).replace("no Wan transformer", "the transformer")
        for name, shape in [*shapes, *((name, tensor.shape) for name, tensor in self.diffs.items())]:
            module = name.removesuffix(".weight")
            if name not in weights:
                of = ": it is of an image-to-video model" if "_img" in name or "img_emb" in name else ""
                raise ValueError(f"this LoRA changes {module}, which {model} does not have{of}.")
            if weights[name].shape != tuple(shape):
                here, there = (" x ".join(map(str, sizes)) for sizes in (shape, weights[name].shape))
                raise ValueError(
                    f"this LoRA is another model's: at {module} it is {here}, in {model} that is {there}."
                )

    def peft_config(self) -> LoraConfig | None:
        """With ranks and alphas of its own where modules differ; `None` if there is no A and B at all."""
        if not self.modules:
            return None
        ranks = {name: module.rank for name, module in self.modules.items()}
        alphas = {name: module.alpha for name, module in self.modules.items()}
        rank, alpha = mode(ranks.values()), mode(alphas.values())
        return LoraConfig(
            r=rank,
            lora_alpha=alpha,
            rank_pattern={name: value for name, value in ranks.items() if value != rank},
            alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
            target_modules=sorted(self.modules),
            lora_dropout=self.config.get("lora_dropout", 0.0),
            use_dora=any(module.magnitude is not None for module in self.modules.values()),
        )

    def state_dict(self) -> dict[str, torch.Tensor]:
        """As `save_lora_weights(transformer_lora_layers=...)` takes it. Copies: the file may be mapped into memory."""
        tensors = {}
        for name, module in self.modules.items():
            tensors |= {f"{name}.lora_A.weight": module.a, f"{name}.lora_B.weight": module.b}
            if module.magnitude is not None:
                tensors[f"{name}.lora_magnitude_vector"] = module.magnitude
        for name, tensor in self.diffs.items():
            owner, bias, _ = name.rpartition(".bias")
            tensors[f"{owner}.lora_diff_b" if bias else f"{name.removesuffix('.weight')}.lora_diff"] = tensor
        return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def load_original_loras(
    name: str | Path, weight_name: str | None = None, alpha: float | None = None, **hub
) -> dict[str, OriginalLora]:
    """The LoRAs of a file, folder or Hub repository by component; see [`find_lora_file`] and [`parse_loras`]."""
    return parse_loras(*read_lora_file(find_lora_file(name, weight_name, **hub)), alpha)


def parse_loras(
    tensors: Mapping[str, Any], config: dict[str, Any] | None = None, alpha: float | None = None
) -> dict[str, OriginalLora]:
    """What a file holds for each component of a pipeline, by its name: mostly the transformer's alone. Arguments and
    errors are those of [`parse_lora`]."""
    configs = split_lora(config or {})
    return {name: parse_lora(part, configs.get(name), alpha) for name, part in split_lora(tensors).items()}


def parse_lora(
    tensors: Mapping[str, Any], config: dict[str, Any] | None = None, alpha: float | None = None
) -> OriginalLora:
    """
    A LoRA from the tensors of a file, every one of which is used, and peft's config, where one came with them; `alpha`
    of one that does not say it. The names are any trainer's; or it is LongLive's dict with an entry `generator_lora`.

    Raises:
        ValueError: a tensor that is not understood, half a module, numbers that are not finite, another adapter.
    """
    config = config or {}
    if config:
        _check_config(config)
    if not isinstance(tensors, Mapping):
        raise ValueError(f"this is no LoRA: it holds a {type(tensors).__name__}, not tensors by name.")
    for name in ("generator_lora", "state_dict"):
        if isinstance(tensors.get(name), Mapping):
            tensors = tensors[name]
    if not tensors:
        raise ValueError("this is no LoRA: it is empty.")
    parts: dict[str, dict[str, torch.Tensor]] = {}
    names = {}  # of the modules, in the file
    for key, tensor in tensors.items():
        module, kind, names[module] = parse_key(key)
        if kind in parts.setdefault(module, {}):
            raise ValueError(f"this LoRA has two tensors for {kind} of {module}; the second is {key}.")
        parts[module][kind] = _usable(tensor, key)
    modules, diffs, has_alpha = {}, {}, bool(config)
    for name, part in parts.items():
        if {"A", "B"} & part.keys():
            has_alpha |= "alpha" in part
            modules[name] = module = _make_module(name, part, config and _said_by(config, names[name]), alpha)
            if "B.bias" in part:
                part["diff_b"] = part.get("diff_b", 0) + module.scale * part["B.bias"].float()
        elif lone := {"alpha", "magnitude", "B.bias"} & part.keys():
            raise ValueError(f"this LoRA is incomplete: {name} has {', '.join(sorted(lone))} but no A and B.")
        # Distilled models' LoRAs hold many that are zero.
        if "diff" in part and part["diff"].any():
            diffs[name if name.endswith("scale_shift_table") else f"{name}.weight"] = part["diff"]
        if "diff_b" in part and part["diff_b"].any():
            diffs[f"{name}.bias"] = part["diff_b"]
    dora = [name for name, module in modules.items() if module.magnitude is not None]
    if dora and (len(dora) < len(modules) or diffs):
        raise ValueError("this LoRA mixes DoRA with other changes, which cannot be applied together.")
    if config.get("use_dora") and not dora:
        raise ValueError("this LoRA is incomplete: its config says DoRA, and it has no lora_magnitude_vector.")
    if alpha is not None and (has_alpha or not math.isfinite(alpha)):
        raise ValueError(f"this LoRA says its alpha itself, or {alpha} is none: leave it out.")
    return OriginalLora(modules, diffs, config)


def _usable(tensor: Any, key: str) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"this is no LoRA: {key} is no tensor.")
    if not tensor.is_floating_point() and not key.endswith(".alpha"):
        raise ValueError(f"this LoRA holds {key} of {str(tensor.dtype).removeprefix('torch.')}, which is no weight.")
    if tensor.dtype.itemsize == 1:
        tensor = tensor.to(torch.bfloat16)  # which has all values of 8 bits
    if not tensor.isfinite().all():
        raise ValueError(f"this LoRA is damaged: {key} holds NaN or infinite numbers.")
    return tensor


def _said_by(config: dict[str, Any], module: str) -> tuple[int, float]:
    """Rank, and alpha for a scale of alpha / rank, of a module in the names of the file's trainer."""
    rank = _of_pattern(config, "rank_pattern", "r", module)
    alpha = _of_pattern(config, "alpha_pattern", "lora_alpha", module)
    return rank, alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _of_pattern(config: dict[str, Any], pattern: str, default: str, module: str) -> float | None:
    """The number of a module where a pattern of peft's config has one, or the one of all."""
    numbers = config.get(pattern) or {}
    keys = (get_pattern_key(numbers, name) for name in trainer_names(module))
    return next((numbers[key] for key in keys if key in numbers), config.get(default))


def _make_module(
    name: str, part: dict[str, torch.Tensor], said: tuple[int, float] | None, alpha: float | None
) -> LoraModule:
    for have, lack in (("A", "B"), ("B", "A")):
        if lack not in part:
            raise ValueError(f"this LoRA is incomplete: {name} has {have} but no {lack}.")
    a, b, magnitude = part["A"], part["B"], part.get("magnitude")
    if a.ndim < 2 or b.ndim < 2 or a.shape[0] != b.shape[1] or b.shape[2:].numel() != 1 or not a.numel():
        raise ValueError(f"this LoRA is damaged: at {name}, A is {tuple(a.shape)} and B {tuple(b.shape)}.")
    rank = a.shape[0]
    if "alpha" in part:
        if part["alpha"].numel() != 1:
            raise ValueError(f"this LoRA is damaged: alpha of {name} is {tuple(part['alpha'].shape)}.")
        alpha = part["alpha"].item()
    elif said:
        if said[0] != rank:
            raise ValueError(f"this LoRA does not fit its own config: rank {said[0]} there, {rank} at {name}.")
        alpha = said[1]
    elif alpha is None:
        alpha = rank
    if magnitude is not None and magnitude.shape not in ((b.shape[0],), (b.shape[0], 1)):
        raise ValueError(
            f"this LoRA is a DoRA whose dora_scale at {name} is {tuple(magnitude.shape)}; only one of "
            f"{b.shape[0]} numbers, one an output, can be applied."
        )
    magnitude = None if magnitude is None else magnitude.flatten()
    return LoraModule(a, b, int(alpha) if alpha == int(alpha) else alpha, magnitude)


def _check_config(config: dict[str, Any]) -> None:
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"this is a {config['peft_type']} adapter of peft, not a LoRA.")
    if missing := [name for name in ("r", "lora_alpha") if name not in config]:
        raise ValueError(f"this LoRA has a config without {missing[0]}, without which its scale is not known.")
    named = {name: config[name] for name in ("r", "lora_alpha")}
    for field_name in ("alpha_pattern", "rank_pattern"):
        pattern = config.get(field_name) or {}
        if not isinstance(pattern, dict):
            raise ValueError(f"this LoRA: {field_name} of its config has to be a dict but is {pattern!r}.")
        named |= {f"{field_name} {name}": value for name, value in pattern.items()}
    for name, value in named.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"this LoRA: {name} of its config has to be a number but is {value!r}.")
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise ValueError(
            f"this LoRA was trained from {start!r}, which changes the base weights too: have peft convert it to a "
            "plain LoRA (`path_initial_model_for_weight_conversion` of its save_pretrained)."
        )
    if variants := [name for name in _VARIANTS if config.get(name)]:
        raise ValueError(f"this LoRA is a variant of LoRA that is not read: {', '.join(variants)} in its config.")
