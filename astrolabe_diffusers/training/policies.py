"""Current, old and reference policy on one transformer: two LoRA adapters, and none."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig
from torch import nn


# The current policy has peft's and diffusers' default name, so that their savers and loaders take it.
CURRENT, OLD = "default", "old"
POLICIES = ("current", "old", "reference")


def block_linear_names(transformer: nn.Module) -> list[str]:
    """Suffixes of the names of all Linear layers in the transformer's repeated blocks (`attn1.to_q`, ...)."""
    names = set()
    for block in transformer.modules():
        if type(block).__name__ in transformer._repeated_blocks:
            names |= {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    return sorted(names)


def add_policies(
    transformer: nn.Module, rank: int, lora_alpha: int, lora_dropout: float = 0.0, target_modules: list[str] = ()
):
    """Freeze the transformer and add the adapters `default` (current policy, trainable) and `old`, equal at first.

    LoRA weights are float32 whatever the base is. B starts at zero, so that all three policies coincide.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        init_lora_weights="gaussian",
        target_modules=list(target_modules) or block_linear_names(transformer),
    )
    transformer.add_adapter(config, adapter_name=CURRENT)
    _complete_policies(transformer)


def load_policies(pipeline, lora: str | Path):
    """As `add_policies`, with a LoRA that `load_lora_weights` takes as current and old policy: rank, alpha and target
    modules are its own. The reference is the transformer without it."""
    pipeline.load_lora_weights(lora, adapter_name=CURRENT)
    _complete_policies(pipeline.transformer)


def _complete_policies(transformer: nn.Module):
    transformer.requires_grad_(False)
    with warnings.catch_warnings():
        # peft takes the second adapter for a mistake.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        transformer.add_adapter(copy.deepcopy(transformer.peft_config[CURRENT]), adapter_name=OLD)
    for name in (CURRENT, OLD):
        for parameter in policy_parameters(transformer, name):
            parameter.data = parameter.data.float()
    update_old_policy(transformer, decay=0.0)
    activate_current(transformer)


def policy_parameters(transformer: nn.Module, adapter: str = CURRENT) -> list[nn.Parameter]:
    """LoRA parameters of an adapter, in the order of the modules: those of two adapters correspond pairwise."""
    return [parameter for name, parameter in transformer.named_parameters() if f".{adapter}." in name]


def activate_current(transformer: nn.Module):
    """Make the current policy the active and the only trainable one."""
    transformer.set_adapter(CURRENT)


@contextmanager
def use_policy(transformer: nn.Module, policy: str) -> Iterator[nn.Module]:
    """Run as the `"current"`, `"old"` or `"reference"` policy, in eval mode and without gradients.

    Afterwards, come what may, the current policy is active and trainable again. peft ties `requires_grad` to the
    active adapter and gradients are lost without an error if it changes between forward and backward: finish the
    backward pass before entering.
    """
    if policy not in POLICIES:
        raise ValueError(f"`policy` must be one of {POLICIES}, not {policy!r}.")
    training = transformer.training
    transformer.eval()
    try:
        if policy == "old":
            transformer.set_adapter(OLD)
        elif policy == "reference":
            transformer.disable_adapters()
        with torch.no_grad():
            yield transformer
    finally:
        if policy == "old":
            activate_current(transformer)
        elif policy == "reference":
            transformer.enable_adapters()
        transformer.train(training)


@torch.no_grad()
def update_old_policy(transformer: nn.Module, decay: float):
    """`old <- decay old + (1 - decay) current`, in place and parameter by parameter (local shards if sharded)."""
    pairs = zip(policy_parameters(transformer, OLD), policy_parameters(transformer, CURRENT), strict=True)
    for old, current in pairs:
        old.lerp_(current, 1 - decay)


def old_policy_decay(step: int, rate: float, maximum: float) -> float:
    """`min(rate * step, maximum)`: the old policy follows closely at first (DiffusionNFT's schedule)."""
    return min(rate * step, maximum)
