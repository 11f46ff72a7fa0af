"""LoRA layers in a transformer: their weights in one call, and the transformer without them."""

import functools
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
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


def check_lora_weights(model: nn.Module, weights: Iterable[float], adapters: Iterable[str] | None = None):
    """Raise a one-line `ValueError` if these LoRAs, by default the active ones, cannot have these weights."""
    weights = list(weights)
    for weight in weights:
        if not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"the weight of a LoRA has to be a finite number but is {weight!r}.")
    if any(weight != 1 for weight in weights):
        for layer in tuner_layers(model):
            for name in layer.active_adapters if adapters is None else adapters:
                if getattr(layer, "use_dora", {}).get(name):
                    # peft would scale B A before the rows get their lengths: at 0 that is not the base model.
                    raise ValueError(f"{name} is a DoRA, which can only be applied with weight 1, or disabled.")


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
        unknown = set(attention_kwargs or ()) - {"scale"}
        if unknown:
            raise ValueError(f"`attention_kwargs` may have scale, and has {', '.join(map(repr, sorted(unknown)))}.")
        scale = (attention_kwargs or {}).get("scale", 1.0)
        if not getattr(self, "peft_config", None):
            return forward(self, *args, **kwargs)
        # torch.compile knows no locks; the whole call is one graph.
        with nullcontext() if torch.compiler.is_compiling() else lora_lock(self):
            if scale == 1:
                return forward(self, *args, **kwargs)
            check_lora_weights(self, [scale])
            with lora_weights(self, lora_weights_of(self)):
                for layer in tuner_layers(self):
                    layer.scale_layer(scale)
                return forward(self, *args, **kwargs)

    return wrapper


def lora_weights_of(model: nn.Module) -> list[dict[str, float]]:
    """Those of every adapter, by layer."""
    return [dict(layer.scaling) for layer in tuner_layers(model)]


@contextmanager
def lora_weights(model: nn.Module, weights: list[dict[str, float]]) -> Iterator[None]:
    """Inside, the adapters have these weights, and whatever is set inside ends with it."""
    layers, before = tuner_layers(model), lora_weights_of(model)
    try:
        for layer, inside in zip(layers, weights):
            layer.scaling.update(inside)
        yield
    finally:
        for layer, outside in zip(layers, before):
            layer.scaling.update(outside)


def recomputed(block: nn.Module) -> Callable:
    """A block for gradient checkpointing. It is computed again in the backward pass, when the call that gave its LoRAs
    their weights is over: with those weights."""
    weights = lora_weights_of(block)

    def forward(*args):
        with lora_weights(block, weights):
            return block(*args)

    return forward
