"""LoRA files meet a transformer."""

import torch
from torch import nn


def check_lora_fits(state_dict: dict[str, torch.Tensor], transformer: nn.Module, prefix: str = "transformer."):
    """Raise a one-line `ValueError` if a LoRA in Diffusers format was made for another model.

    peft would report every single tensor, and would pass over layers that the model does not have.
    """
    modules = dict(transformer.named_modules())
    for key, weight in state_dict.items():
        name, _, matrix = key.removeprefix(prefix).partition(".lora_")
        module = modules.get(name)
        if module is None:
            raise ValueError(f"this LoRA is another model's: it changes {name}, which the transformer does not have.")
        # A is (rank, in_features), B is (out_features, rank).
        size, axis = (module.in_features, 1) if matrix.startswith("A") else (module.out_features, 0)
        if weight.shape[axis] != size:
            raise ValueError(
                f"this LoRA is another model's: at {name} it is made for {weight.shape[axis]} features, the "
                f"transformer has {size}."
            )
