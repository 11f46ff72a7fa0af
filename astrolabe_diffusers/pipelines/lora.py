"""LoRA files of every layout meet the pipeline's transformer."""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.loaders import WanLoraLoaderMixin
from diffusers.loaders.lora_base import _func_optionally_disable_offloading
from diffusers.loaders.lora_pipeline import _LOW_CPU_MEM_USAGE_DEFAULT_LORA
from diffusers.utils.torch_utils import unwrap_module
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from ..layouts.experts import MEMORY_TRANSFORMER, TRANSFORMER, split_lora
from ..layouts.lora_modules import LoraModule, OriginalLora, load_original_loras, parse_lora, parse_loras
from ..models.lora_layers import (
    LoraDiff,
    add_lora_diffs,
    check_nothing_fused,
    find_diff_layers,
    plain_state_dict,
    put_back_loose_weights,
    tuner_layers,
)


_PREFIX = f"{TRANSFORMER}."


def _with_prefix(values: dict[str, Any], component: str = TRANSFORMER) -> dict[str, Any]:
    return {f"{component}.{name}": value for name, value in values.items()}


def _without_prefix(values: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(_PREFIX): value for name, value in values.items()}


class CausalWanLoraLoaderMixin(WanLoraLoaderMixin):
    """`load_lora_weights` for everything that docs/lora_files.md lists; what cannot be applied whole is refused."""

    _lora_loadable_modules = [TRANSFORMER, MEMORY_TRANSFORMER]

    @classmethod
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, torch.Tensor],
        weight_name: str | None = None,
        return_lora_metadata: bool = False,
        use_safetensors: bool | None = None,
        **hub,
    ) -> dict[str, torch.Tensor] | tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
        """
        The LoRA of a file, folder, Hub repository or dict under diffusers' names, and with `return_lora_metadata`
        peft's config; without it the scales, which it has, are in B. Names begin with the component, `transformer` or
        `memory_transformer`. `use_safetensors` is diffusers' and unused; `hub` are subfolder, revision, token,
        cache_dir, force_download, proxies, local_files_only. A one-line `ValueError` if it is no LoRA or cannot be
        applied whole.
        """
        source = pretrained_model_name_or_path_or_dict
        loras = parse_loras(source) if isinstance(source, dict) else load_original_loras(source, weight_name, **hub)
        tensors, metadata = {}, {}
        for component, lora in loras.items():
            if not return_lora_metadata:
                lora = replace(lora, modules={name: module.with_scale_one() for name, module in lora.modules.items()})
            tensors |= _with_prefix(lora.state_dict(), component)
            if config := lora.peft_config():
                target_modules = lora.config.get("target_modules") or config.target_modules
                metadata |= _with_prefix(config.to_dict() | {"target_modules": target_modules}, component)
        return (tensors, metadata or None) if return_lora_metadata else tensors

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        load_into_memory_transformer: bool = False,
        low_cpu_mem_usage: bool = _LOW_CPU_MEM_USAGE_DEFAULT_LORA,
        **kwargs,
    ):
        """
        As the parent's; `kwargs` are those of `lora_state_dict`. What `save_lora_weights` has written for the memory
        transformer goes there. All else is the transformer's, or with `load_into_memory_transformer` the memory
        transformer's, as diffusers has it with `load_into_transformer_2`.
        """
        source = pretrained_model_name_or_path_or_dict
        tensors, metadata = self.lora_state_dict(source, return_lora_metadata=True, **kwargs)
        parts, configs = split_lora(tensors), split_lora(metadata or {})
        if load_into_memory_transformer and TRANSFORMER in parts:
            if MEMORY_TRANSFORMER in parts:
                raise ValueError("this LoRA says what is whose: leave out `load_into_memory_transformer`.")
            parts, configs = ({MEMORY_TRANSFORMER: values[TRANSFORMER]} for values in (parts, configs))
        experts = self.experts
        for name in parts:
            if name not in experts:
                raise ValueError(f"this LoRA is for {name}, which this pipeline does not have.")
        taken = {adapter for name in parts for adapter in getattr(experts[name], "peft_config", {})}
        adapter_name = adapter_name or _free_name(taken)
        own = [name for name in experts if adapter_name in getattr(experts[name], "peft_config", {})]
        if hotswap and set(own) != parts.keys():
            raise ValueError(
                f"with `hotswap` a LoRA takes the place of one of its name and of its transformers: {adapter_name!r} "
                f"is of {' and '.join(own) or 'none'}, this LoRA of {' and '.join(parts)}."
            )
        if len(parts) > 1:  # all of it or nothing
            for name, part in parts.items():
                _fitting_lora(part, experts[name], configs.get(name, {}), adapter_name, hotswap)
        for name, part in parts.items():
            self.load_lora_into_transformer(
                part,
                experts[name],
                adapter_name,
                metadata=configs.get(name),
                hotswap=hotswap,
                low_cpu_mem_usage=low_cpu_mem_usage,
                _pipeline=self,
            )

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | Path,
        transformer_lora_layers: dict[str, torch.Tensor] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function=None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
        memory_transformer_lora_layers: dict[str, torch.Tensor] | None = None,
        memory_transformer_lora_adapter_metadata: dict[str, Any] | None = None,
    ):
        """As the parent's; the memory transformer's LoRA is in the same file, under its component's name."""
        layers = {TRANSFORMER: transformer_lora_layers, MEMORY_TRANSFORMER: memory_transformer_lora_layers}
        metadata = {
            TRANSFORMER: transformer_lora_adapter_metadata,
            MEMORY_TRANSFORMER: memory_transformer_lora_adapter_metadata,
        }
        layers = {name: tensors for name, tensors in layers.items() if tensors}
        if not layers:
            raise ValueError("nothing to save: give transformer_lora_layers or memory_transformer_lora_layers.")
        cls._save_lora_weights(
            save_directory=save_directory,
            lora_layers=layers,
            lora_metadata={name: metadata[name] for name in layers},
            is_main_process=is_main_process,
            weight_name=weight_name,
            save_function=save_function,
            safe_serialization=safe_serialization,
        )

    def fuse_lora(self, components: list[str] | None = None, *args, **kwargs):
        """As the parent's; of both transformers unless `components` are given."""
        super().fuse_lora(components or self._lora_loadable_modules, *args, **kwargs)

    def unfuse_lora(self, components: list[str] | None = None, **kwargs):
        """As the parent's; of both transformers unless `components` are given. The LoRAs have the weights that they
        had before they were fused."""
        components = components or self._lora_loadable_modules
        super().unfuse_lora(components, **kwargs)
        for transformer in (getattr(self, name, None) for name in components):
            if transformer is not None:  # the parent's takes it out of its layers one by one
                put_back_loose_weights(tuner_layers(transformer))

    @classmethod
    def load_lora_into_transformer(
        cls, state_dict, transformer, adapter_name=None, metadata=None, hotswap=False, **kwargs
    ):
        """As the parent's, which `load_lora_weights` ends in; a LoRA that does not fit is refused in one line."""
        transformer = unwrap_module(transformer)  # of torch.compile, under which names begin with another module
        metadata = _without_prefix(metadata or {})
        # diffusers would count the adapters of one layer, which need not have all.
        adapter_name = adapter_name or _free_name(getattr(transformer, "peft_config", {}))
        lora, biases = _fitting_lora(state_dict, transformer, metadata, adapter_name, hotswap)
        config = lora.peft_config()
        config.lora_bias = bool(biases)
        if hotswap:
            # What peft compares and then sets the scales from; `set_scales` does that.
            old = transformer.peft_config[adapter_name]
            for name in ("use_rslora", "lora_dropout", "alpha_pattern"):
                setattr(config, name, getattr(old, name))
        # As the file has it, where that names the same modules: a run that goes on from it knows it by these names.
        short = LoraConfig(target_modules=metadata.get("target_modules"))
        names = {name for name, _ in transformer.named_modules() if name}
        if short.target_modules and {x for x in names if check_target_module_exists(short, x)} == set(lora.modules):
            config.target_modules = short.target_modules
        tensors = replace(lora, diffs={}).state_dict()
        if biases:  # peft has them in all modules or in none
            for name, module in lora.modules.items():
                tensors[f"{name}.lora_B.bias"] = biases.get(name, torch.zeros(module.b.shape[0])).clone()
        with without_offloading(kwargs.get("_pipeline")):
            super().load_lora_into_transformer(
                _with_prefix(tensors),
                transformer,
                adapter_name=adapter_name,
                metadata=_with_prefix(config.to_dict()),
                hotswap=hotswap,
                **kwargs,
            )
            if hotswap:
                set_scales(lora, transformer, adapter_name)
            add_lora_diffs(transformer, adapter_name, lora.diffs)
        # The new layers are in training mode, where the dropout that a LoRA was trained with works.
        transformer.train(transformer.training)


def _fitting_lora(
    tensors: dict[str, torch.Tensor],
    transformer: nn.Module,
    metadata: dict[str, Any],
    adapter_name: str,
    hotswap: bool,
) -> tuple[OriginalLora, dict[str, torch.Tensor]]:
    """The LoRA of a state dict and its config, as [`split_for_peft`] leaves it and filled up to the ranks that its
    layers have or are to have; a one-line `ValueError` if it cannot be applied whole, or there is one of its name."""
    lora, transformer = parse_lora(_without_prefix(tensors), _without_prefix(metadata)), unwrap_module(transformer)
    lora.check_fits(plain_state_dict(transformer))
    check_not_fused(lora, transformer)
    check_nothing_fused(tuner_layers(transformer))
    taken = getattr(transformer, "peft_config", {})
    if adapter_name in taken and not hotswap:
        raise ValueError(
            f"there is a LoRA {adapter_name!r} already: unload it, or give another `adapter_name` than "
            f"{', '.join(map(repr, taken))}."
        )
    lora, biases = split_for_peft(lora, transformer)
    if biases and getattr(transformer, "is_quantized", False):
        raise ValueError("this LoRA adds to biases, which peft has no place for beside quantised weights.")
    find_diff_layers(transformer, lora.diffs)
    if hotswap:
        check_can_be_swapped(lora, biases, transformer, adapter_name)
        return fill_layers(lora, transformer, adapter_name), biases
    # peft would pad A and B, and leave alpha.
    rank = (transformer._prepare_lora_hotswap_kwargs or {}).get("target_rank") or 0
    return replace(lora, modules={name: module.padded(rank) for name, module in lora.modules.items()}), biases


def _free_name(taken: Iterable[str]) -> str:
    return next(name for name in map("default_{}".format, itertools.count()) if name not in taken)


@contextmanager
def without_offloading(pipeline: DiffusionPipeline | None) -> Iterator[None]:
    """Inside, parameters are where they can be read. diffusers does so too, but only while it loads a LoRA: what comes
    after would find those of a pipeline that is offloaded sequentially on the meta device again."""
    is_model_offload, is_sequential_offload, is_group_offload = _func_optionally_disable_offloading(pipeline)
    try:
        yield
    finally:
        if is_model_offload:
            pipeline.enable_model_cpu_offload()
        elif is_sequential_offload:
            pipeline.enable_sequential_cpu_offload()
        elif is_group_offload:
            for component in pipeline.components.values():
                if isinstance(component, nn.Module):
                    _maybe_remove_and_reapply_group_offloading(component)


def check_not_fused(lora: OriginalLora, transformer: nn.Module):
    """Raise a one-line `ValueError` if the LoRA changes projections whose place a fused copy has taken."""
    for name, module in transformer.named_modules():
        parts = [f"{name}.to_{x}.{end}" for x in "qkv" for end in ("weight", "bias")]
        if getattr(module, "fused_projections", False) and any(map(lora.changes, parts)):
            raise ValueError(
                "a LoRA needs Q, K and V apart, and this transformer has them fused: call its "
                "unfuse_qkv_projections() first."
            )


def adapter_layers(transformer: nn.Module, adapter: str) -> dict[str, LoraLayer]:
    """By name, the layers in which an adapter has A and B."""
    layers = {name: module for name, module in transformer.named_modules() if isinstance(module, LoraLayer)}
    return {name: layer for name, layer in layers.items() if adapter in layer.lora_A}


def check_can_be_swapped(lora: OriginalLora, biases: dict[str, torch.Tensor], transformer: nn.Module, adapter: str):
    """Raise a one-line `ValueError` if the LoRA, as [`split_for_peft`] leaves it, cannot take an adapter's place."""
    if lora.diffs or any(isinstance(layer, LoraDiff) for layer in tuner_layers(transformer)):
        raise ValueError("a LoRA that adds to norms or modulation cannot be swapped in or out with `hotswap`.")
    layers = adapter_layers(transformer, adapter)
    doras = [layer.use_dora[adapter] for layer in layers.values()]
    doras += [module.magnitude is not None for module in lora.modules.values()]
    if any(doras):
        raise ValueError("a DoRA cannot be swapped in or out with `hotswap`.")
    if others := sorted(lora.modules.keys() - layers.keys()):
        raise ValueError(
            f"this LoRA changes {others[0]}, {len(others)} such modules in all, where {adapter!r} has no layer to "
            "swap it into: load the LoRA that changes more modules first, or this one without `hotswap`."
        )
    if biases and any(layer.lora_B[adapter].bias is None for layer in layers.values()):
        raise ValueError(f"this LoRA adds to biases, for which {adapter!r} has no place: load it without `hotswap`.")
    # peft takes the tensors whose names hold the adapter's anywhere for its own, and empties those it is not given.
    for name in transformer.state_dict():
        _, is_lora, rest = name.partition(".lora_")
        if is_lora and adapter in name and f".{adapter}." not in rest:
            raise ValueError(
                f"peft would empty {name} too, for {adapter!r} is in its name: load the LoRA that is to be swapped "
                "under a name that is no part of another one's."
            )


def fill_layers(lora: OriginalLora, transformer: nn.Module, adapter: str) -> OriginalLora:
    """The same LoRA with A and B for all layers that an adapter has, of their dtype, which peft would change with the
    rank, and of ranks that are no less than there."""
    modules = {}
    for name, layer in adapter_layers(transformer, adapter).items():
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        new = lora.modules.get(name) or LoraModule(torch.zeros(a.shape), torch.zeros(b.shape), alpha=len(a))
        modules[name] = replace(new, a=new.a.to(a.dtype), b=new.b.to(b.dtype)).padded(len(a))
    return replace(lora, modules=modules)


def set_scales(lora: OriginalLora, transformer: nn.Module, adapter: str):
    """Give layers and config of an adapter the ranks and alphas of the LoRA that has been swapped in. peft leaves the
    old ones there, and looks its patterns up by names of parameters, which they do not match."""
    for name, module in lora.modules.items():
        layer = transformer.get_submodule(name)
        layer.r[adapter], layer.lora_alpha[adapter], layer.use_rslora[adapter] = module.rank, module.alpha, False
        if isinstance(layer.scaling[adapter], torch.Tensor):  # one that compiled graphs hold
            layer.scaling[adapter].fill_(module.scale)
        else:
            layer.scaling[adapter] = module.scale
    said, config = lora.peft_config(), transformer.peft_config[adapter]
    for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"):
        setattr(config, name, getattr(said, name))


def split_for_peft(lora: OriginalLora, transformer: nn.Module) -> tuple[OriginalLora, dict[str, torch.Tensor]]:
    """The same LoRA as peft's layers carry it, and what is added to biases, by module. What is added to a whole matrix
    or convolution becomes an A and B of full rank; `diffs` are those left that peft has no layers for."""
    modules, biases, rest = dict(lora.modules), {}, {}
    for name, diff in lora.diffs.items():
        module, _, parameter = name.rpartition(".")
        layer = transformer.get_submodule(module)
        layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        if not isinstance(layer, (nn.Linear, nn.Conv3d)):
            rest[name] = diff
        elif parameter == "bias":
            biases[module] = diff
        else:
            modules[module] = modules[module].add(diff) if module in modules else LoraModule.of_full_rank(diff)
    weights = plain_state_dict(transformer)
    for name in biases:
        # peft scales the bias of B too: with a scale of 1 it stays what it is.
        module = modules.get(name) or LoraModule.of_zeros(weights[f"{name}.weight"])
        modules[name] = module.with_scale_one()
    if not modules:
        # peft knows no adapter without a module.
        linears = (name for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear))
        name = next(name for name in linears if f"{name}.weight" in weights)
        modules[name] = LoraModule.of_zeros(weights[f"{name}.weight"])
    return replace(lora, modules=modules, diffs=rest), biases
