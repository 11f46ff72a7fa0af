"""The second expert of a model in the files that hold both (Self Gradient Forcing+)."""

from collections.abc import Mapping
from typing import TypeVar


T = TypeVar("T")

# The pipeline's components.
EXPERTS = TRANSFORMER, MEMORY_TRANSFORMER = "transformer", "memory_transformer"
# In the name of a tensor in the original layout, anywhere: `blocks.0.self_attn.q.memory_weight`.
_MARK = "memory_"


def split_checkpoint(tensors: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """By component, the tensors of a checkpoint under the names that they have in one of a single model. Without any
    of a second expert that is a copy of the first, and no component."""
    parts = {TRANSFORMER: {}, MEMORY_TRANSFORMER: {}}
    for name, tensor in tensors.items():
        parts[MEMORY_TRANSFORMER if _MARK in name else TRANSFORMER][name.replace(_MARK, "", 1)] = tensor
    return _non_empty(parts)


def split_lora(values: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """By component, the tensors of a LoRA file or the entries of its config, where `save_lora_weights` puts the name
    of the component first; names without one are the transformer's."""
    parts, start = {TRANSFORMER: {}, MEMORY_TRANSFORMER: {}}, f"{MEMORY_TRANSFORMER}."
    for name, value in values.items():
        parts[MEMORY_TRANSFORMER if name.startswith(start) else TRANSFORMER][name.removeprefix(start)] = value
    return _non_empty(parts)


def _non_empty(parts: dict[str, dict[str, T]]) -> dict[str, dict[str, T]]:
    # Of nothing at all the transformer's part is empty.
    return {name: part for name, part in parts.items() if part} or {TRANSFORMER: {}}
