"""The policies' adapters as LoRA files that every Diffusers pipeline reads."""

from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from ..distributed.agreement import is_first_process
from ..distributed.sharding import full_tensors, shard_like
from ..errors import UserError, as_user_error
from ..files.writing import replacing
from ..layouts.tensor_files import misfits
from ..models.expert_pair import adapted_experts
from ..pipelines.pipeline_causal_wan import CausalWanPipeline
from .policies import CURRENT, EMA, OLD, REFERENCE


# The current policy's file has the name that `load_lora_weights(folder)` looks for.
WEIGHT_NAMES = {
    CURRENT: "pytorch_lora_weights.safetensors",
    **{name: f"pytorch_lora_weights_{name}.safetensors" for name in (OLD, REFERENCE, EMA)},
}


def save_adapter(
    transformer: torch.nn.Module, folder: str | Path, adapter: str = CURRENT, weight_name: str | None = None
):
    """Writes an adapter in Diffusers format, with its LoraConfig in the header so that alpha survives; of an
    [`ExpertPair`] that of both experts into one file. Every process calls it, and the first one writes."""
    arguments = {}
    for component, expert in adapted_experts(transformer).items():
        arguments[f"{component}_lora_layers"] = full_tensors(get_peft_model_state_dict(expert, adapter_name=adapter))
        # peft has sets, whose order would make files of equal runs differ.
        config = expert.peft_config[adapter].to_dict()
        config = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
        arguments[f"{component}_lora_adapter_metadata"] = config
    if is_first_process():
        with replacing(Path(folder) / (weight_name or WEIGHT_NAMES[adapter])) as path:
            CausalWanPipeline.save_lora_weights(path.parent, weight_name=path.name, **arguments)


def load_adapter(transformer: torch.nn.Module, folder: str | Path, adapter: str = CURRENT):
    """Reads an adapter that [`save_adapter`] wrote into the existing one; a [`UserError`] if it does not fit."""
    path = Path(folder) / WEIGHT_NAMES[adapter]
    with as_user_error(f"cannot read the adapter {path}"):
        loaded = load_file(path)
    expected = {
        f"{component}.{key}": value
        for component, expert in adapted_experts(transformer).items()
        for key, value in get_peft_model_state_dict(expert, adapter_name=adapter).items()
    }
    if found := misfits(loaded, {key: value.shape for key, value in expected.items()}):
        raise UserError(f"the adapter {path} is another model's or has other lora_target_modules: {found}.")
    with torch.no_grad():
        for key, value in expected.items():  # the parameters themselves
            value.copy_(shard_like(loaded[key], value))
