"""What runs when a module is called."""

from collections.abc import Callable

import torch
from torch import nn


def is_hooked(module: nn.Module) -> bool:
    """Whether offloading has put itself before the module's own forward."""
    # Not by `hasattr`: a module takes long to say what it does not have.
    return "_hf_hook" in vars(module) or "_diffusers_hook" in vars(module)


def has_hooks(model: nn.Module) -> bool:
    """Whether a module inside has hooks, as of offloading: its weights may then be anywhere until it is called."""
    return any(is_hooked(module) for module in model.modules() if module is not model)


def forward_of(module: nn.Module) -> Callable:
    """The function that computes the module's result, to be compared with others: its class's, or what somebody has
    put in its place. Offloading comes before it and is passed over."""
    return type(module).forward if is_hooked(module) else getattr(module.forward, "__func__", module.forward)


def is_plain_module(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether what a module of this very class computes may be computed without a call of it: nothing is hooked in.
    Not while compiling, which fuses what it calls."""
    if torch.compiler.is_compiling() or type(module) is not kind:
        return False
    attributes = vars(module)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" not in attributes and not any(attributes[name] for name in hooks)
