"""LoRA layers in a transformer: their weights in one call, the transformer without them, and layers for norms."""

import functools
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn


# peft keeps the weight in the layers, where every thread sees it. Not an attribute: a lock cannot be copied.
_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


def lora_lock(model: nn.Module) -> threading.RLock:
    """Held while the weights of a model's LoRAs are used or changed."""
    return _LOCKS.setdefault(model, threading.RLock())


def tuner_layers(model: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def plain_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state without that of adapters, under the names that it has without them."""
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }


def check_lora_weights(layers: list[BaseTunerLayer], weights: Iterable[float], adapters: Iterable[str] | None = None):
    """Raise a one-line `ValueError` if these LoRAs, by default the active ones, cannot have these weights."""
    weights = list(weights)
    for weight in weights:
        if not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"the weight of a LoRA has to be a finite number but is {weight!r}.")
    if any(weight != 1 for weight in weights):
        for layer in layers:
            for name in layer.active_adapters if adapters is None else adapters:
                if getattr(layer, "use_dora", {}).get(name):
                    # peft would scale B A before the rows get their lengths: at 0 that is not the base model.
                    raise ValueError(f"{name} is a DoRA, which can only be applied with weight 1, or disabled.")


def check_nothing_fused(layers: list[BaseTunerLayer]):
    """Raise a one-line `ValueError` if a LoRA is fused: peft takes it out again with the weight that it has then,
    which must be the one that it was fused with."""
    if any(layer.merged for layer in layers):
        raise ValueError(
            "a LoRA is fused into the weights: call unfuse_lora() first, or unload_lora_weights(), which keeps the "
            "fused weights."
        )


def scale_to_fuse(layers: list[BaseTunerLayer], scale: float, adapters: Iterable[str] | None = None):
    """Give adapters that are about to be fused, by default the active ones, their weights times `scale`, which they
    keep until they are taken out again."""
    for layer, weights in zip(layers, scaled_weights(layers, scale, adapters)):
        layer.loose_weights = getattr(layer, "loose_weights", {})
        for name in weights.keys() - set(layer.merged_adapters):
            layer.loose_weights[name] = layer.scaling[name]
            layer.scaling[name] = weights[name]


def put_back_loose_weights(layers: list[BaseTunerLayer]):
    """Give adapters that are not fused, or no longer, the weights that they had before [`scale_to_fuse`]."""
    for layer in layers:
        loose = getattr(layer, "loose_weights", {})
        for name in loose.keys() - set(layer.merged_adapters):
            weight = loose.pop(name)
            if name in layer.scaling:  # not deleted
                layer.scaling[name] = weight


def dora_adapters(model: nn.Module) -> set[str]:
    """Names of the adapters that are DoRAs, whose only weight is 1."""
    return {name for layer in tuner_layers(model) for name, used in getattr(layer, "use_dora", {}).items() if used}


def check_no_loose_lora(model: nn.Module):
    """Raise a one-line `ValueError` if the model is not what its own weights say: a LoRA acts that is not fused."""
    for layer in tuner_layers(model):
        acting = set() if layer.disable_adapters else set(layer.active_adapters) & layer._get_available_adapters()
        if acting != set(layer.merged_adapters):
            raise ValueError(
                "a LoRA is loaded, and the file of a transformer has no place for it: fuse_lora() saves the two as "
                "one, unload_lora_weights() the transformer alone."
            )


def apply_lora_scale(forward: Callable) -> Callable:
    """
    `attention_kwargs={"scale": s}` of a transformer's `forward` multiplies the weights of its LoRAs, in this call.

    diffusers' decorator of this name divides by s afterwards, which leaves another weight than there was, and calls
    in other threads see it. Here calls of a transformer with a LoRA take turns, and the weights are put back.
    """

    @functools.wraps(forward)
    def wrapper(self, *args, attention_kwargs: dict[str, Any] | None = None, **kwargs):
        if unknown := set(attention_kwargs or ()) - {"scale"}:
            raise ValueError(f"`attention_kwargs` may have scale, and has {', '.join(map(repr, sorted(unknown)))}.")
        scale = (attention_kwargs or {}).get("scale", 1.0)
        if not getattr(self, "peft_config", None):
            return forward(self, *args, **kwargs)
        # torch.compile knows no locks; the whole call is one graph.
        with nullcontext() if torch.compiler.is_compiling() else lora_lock(self):
            if scale == 1:
                return forward(self, *args, **kwargs)
            layers = tuner_layers(self)
            check_lora_weights(layers, [scale])
            check_nothing_fused(layers)
            with lora_weights(layers, scaled_weights(layers, scale)):
                return forward(self, *args, **kwargs)

    return wrapper


def lora_weights_of(layers: list[BaseTunerLayer]) -> list[dict[str, float]]:
    """Those of every adapter, by layer."""
    return [dict(layer.scaling) for layer in layers]


def scaled_weights(
    layers: list[BaseTunerLayer], scale: float, adapters: Iterable[str] | None = None
) -> list[dict[str, float]]:
    """By layer, the weights of these adapters, by default the active ones, times `scale`. Others than there are: where
    `enable_lora_hotswap` has made tensors of them, peft's own `scale_layer` would write into these."""
    return [
        {
            name: scale * layer.scaling[name]
            for name in (layer.active_adapters if adapters is None else adapters)
            if name in layer.scaling
        }
        for layer in layers
    ]


@contextmanager
def lora_weights(layers: list[BaseTunerLayer], weights: Iterable[dict[str, float]] = ()) -> Iterator[None]:
    """Inside, the adapters have these weights, by layer, and whatever is set inside ends with it."""
    before = lora_weights_of(layers)
    try:
        for layer, inside in zip(layers, weights):
            layer.scaling.update(inside)
        yield
    finally:
        for layer, outside in zip(layers, before):
            layer.scaling.update(outside)


@contextmanager
def adapter_weights(model: nn.Module, weights: dict[str, float]) -> Iterator[None]:
    """Inside, which other threads that call the model wait for, its adapters have these weights, by name.

    Raises:
        ValueError: one is not finite, or is not 1 and of a DoRA; a LoRA is fused.
    """
    with lora_lock(model):
        layers = tuner_layers(model)
        if weights:
            check_nothing_fused(layers)
        for name, weight in weights.items():
            check_lora_weights(layers, [weight], [name])
        with lora_weights(layers):
            for layer in layers:
                for name, weight in weights.items():
                    layer.set_scale(name, weight)
            yield


def recomputed(block: nn.Module) -> Callable:
    """A block for gradient checkpointing. It is computed again in the backward pass, when the call that gave its LoRAs
    their weights is over: with those weights."""
    layers = tuner_layers(block)
    weights = lora_weights_of(layers)

    def forward(*args):
        with lora_weights(layers, weights):
            return block(*args)

    return forward


class Diff(nn.Module):
    """What one adapter adds to one parameter, times its weight. A module, and with a result of its own, for the hooks
    of offloading bring parameters to the device while a module is called, and take them back after it."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, scale: float) -> torch.Tensor:
        return scale * self.weight


class LoraDiff(nn.Module, BaseTunerLayer):
    """
    A norm, or the place where a modulation table is used, and what files add to its parameters, which have no A and B.

    To peft and diffusers it is an adapter's layer like those with A and B: weights, several adapters, fusing,
    disabling and unloading hold for it too. The parameter becomes W + weight * diff, as ComfyUI applies such files.

    Args:
        base_layer: an `nn.RMSNorm`, an `nn.LayerNorm`, or the `nn.Identity` that a modulation table goes through.
        owner: the module that has the parameters.
        parameters: their names: the weight or table, and the bias, which a table has not.
    """

    adapter_layer_names = ("lora_diff", "lora_diff_b")
    other_param_names = ("scaling", "r")

    def __init__(self, base_layer: nn.Module, owner: nn.Module, parameters: tuple[str, str | None]):
        super().__init__()
        self.base_layer = base_layer
        # In a tuple, or the owner of a table would be a submodule of its own.
        self.owner = (owner,)
        self.owner_parameters = parameters
        self.lora_diff, self.lora_diff_b = nn.ModuleDict(), nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.r: dict[str, int] = {}  # diffusers counts a layer's adapters here
        self.merged_adapters = []

    def add(self, adapter: str, parameter: str, diff: torch.Tensor):
        own = getattr(self.owner[0], parameter)
        store = (self.lora_diff, self.lora_diff_b)[self.owner_parameters.index(parameter)]
        store[adapter] = Diff(diff.to(own.device, own.dtype, copy=True))
        self.scaling[adapter], self.r[adapter] = 1.0, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.merged and self.disable_adapters:
            self.unmerge()
        result = self.base_layer(x)
        if self.merged or self.disable_adapters:
            return result
        weight, bias = (
            sum(store[name](self.scaling[name]) for name in self.active_adapters if name in store)
            for store in (self.lora_diff, self.lora_diff_b)
        )
        norm = self.base_layer
        # 0 if no active adapter adds to it.
        if isinstance(weight, torch.Tensor) and isinstance(norm, nn.RMSNorm):
            weight = weight * nn.functional.rms_norm(x, norm.normalized_shape, None, norm.eps)
        elif isinstance(weight, torch.Tensor) and isinstance(norm, nn.LayerNorm):
            weight = weight * nn.functional.layer_norm(x.float(), norm.normalized_shape, None, None, norm.eps)
        change = weight + bias
        return result + change.to(result.dtype) if isinstance(change, torch.Tensor) else result

    @torch.no_grad()
    def _add_to_base(self, adapter: str, sign: int):
        for store, parameter in zip((self.lora_diff, self.lora_diff_b), self.owner_parameters):
            if adapter in store:
                getattr(self.owner[0], parameter).add_(store[adapter](sign * self.scaling[adapter]))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        # `safe_merge` is peft's; diffs are finite since they were read.
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter in self.scaling:
                self._add_to_base(adapter, 1)
                self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        while self.merged_adapters:
            self._add_to_base(self.merged_adapters.pop(), -1)

    def set_scale(self, adapter: str, scale: float) -> None:
        if adapter in self.scaling:
            self.scaling[adapter] = scale

    def scale_layer(self, scale: float) -> None:
        for adapter in self.scaling.keys() & set(self.active_adapters):
            self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        for adapter in self.scaling.keys() & set(self.active_adapters):
            self.scaling[adapter] = 1.0 if scale is None else self.scaling[adapter] / scale


def find_diff_layers(transformer: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """By the name of a parameter, that of the module through which adapters add to it; a `ValueError` if none does."""
    modules, places = dict(transformer.named_modules()), {}
    for name in names:
        owner, _, parameter = name.rpartition(".")
        is_table = parameter == "scale_shift_table"
        places[name] = f"{owner}.modulation".removeprefix(".") if is_table else owner
        kinds = (LoraDiff, nn.Identity) if is_table else (LoraDiff, nn.RMSNorm, nn.LayerNorm)
        if not isinstance(modules.get(places[name]), kinds):
            raise ValueError(f"this LoRA adds to {name}, which this transformer takes no additions to.")
    return places


def add_lora_diffs(transformer: nn.Module, adapter: str, diffs: dict[str, torch.Tensor]):
    """Give an adapter that the transformer has what its file adds to norms and modulation tables, by the name of the
    parameter."""
    peft_layer = next(layer for layer in tuner_layers(transformer) if not isinstance(layer, LoraDiff))
    for name, place in find_diff_layers(transformer, diffs).items():
        owner, _, parameter = name.rpartition(".")
        layer = transformer.get_submodule(place)
        if not isinstance(layer, LoraDiff):
            parameters = ("weight", "bias") if place == owner else (parameter, None)
            layer = LoraDiff(layer, transformer.get_submodule(owner), parameters)
            transformer.set_submodule(place, layer)
        layer.add(adapter, parameter, diffs[name])
        layer.set_adapter(peft_layer.active_adapters)
        layer.enable_adapters(not peft_layer.disable_adapters)
