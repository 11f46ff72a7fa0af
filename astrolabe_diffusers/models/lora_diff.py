"""What LoRA files add to parameters that have no A and B: norms and modulation tables."""

from collections.abc import Iterable

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from .lora_layers import tuner_layers


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
    A norm, or the place where a modulation table is used, and what adapters add to its parameters.

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
