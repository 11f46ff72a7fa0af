"""The pipeline of a run: model, LoRAs, and where and how it computes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

from ..errors import UserError, as_user_error, one_line
from ..files.output_folder import list_checkpoints
from ..models.attention_causal_wan import attend
from ..pipelines.pipeline_causal_wan import CausalWanPipeline


SAMPLED_VALUES = 64


def find_lora(name: str) -> str:
    """What `load_lora_weights` takes for `name`: of a training run that has not finished, its last checkpoint."""
    checkpoints = list_checkpoints(name)
    return name if (Path(name) / LORA_WEIGHT_NAME_SAFE).is_file() or not checkpoints else str(checkpoints[-1])


def load_loras(pipe: CausalWanPipeline, loras: dict[str, float]):
    """Loads LoRAs and activates all of them, each with its weight."""
    names = [f"lora_{i}" for i in range(len(loras))]
    for lora, name in zip(loras, names):
        is_here = "" if Path(lora).exists() else " (nothing here has that name, so it is looked for on the Hub)"
        with as_user_error(f"cannot load the LoRA {lora}{is_here}"):
            pipe.load_lora_weights(find_lora(lora), adapter_name=name)
    pipe.set_adapters(names, list(loras.values()))


def weights_digest(transformer: torch.nn.Module, *sampled: torch.nn.Module) -> str:
    """Changes when the weights of the transformer do, those of loaded LoRAs included, or those of the others.

    Of these each parameter's `SAMPLED_VALUES` are looked at: training changes all, and UMT5's 11 GB take 11 s to read.
    """
    digest = hashlib.sha256()
    for name, parameter in transformer.named_parameters():
        digest.update(f"{name} {torch.hash_tensor(parameter.detach()).item()}\n".encode())
    for module in sampled:
        for name, parameter in module.named_parameters():
            values = parameter.detach().flatten()
            digest.update(f"{name} {values[:: -(-len(values) // SAMPLED_VALUES)].tolist()}\n".encode())
    return digest.hexdigest()[:16]


def place_pipeline(
    pipe: CausalWanPipeline,
    device: torch.device | str,
    offload: str = "none",
    vae_tiling: bool = False,
    attention_backend: str | None = None,
):
    """Puts the pipeline on its device; with `offload`, models or groups of layers while they are used."""
    device = torch.device(device)
    if offload != "none" and device.type == "cpu":
        raise UserError(f"offload={offload} needs a GPU: on a CPU it can only be none.")
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "group":
        pipe.enable_group_offload(device, offload_type="leaf_level", use_stream=True, exclude_modules=["vae"])
    else:
        pipe.to(device)
    if vae_tiling:
        pipe.vae.enable_tiling()
    if attention_backend:
        try:
            pipe.transformer.set_attention_backend(attention_backend)
            # A backend that cannot run on this device or in this dtype only says so when it is called.
            shape = 1, 16, 1, pipe.transformer.config.attention_head_dim
            query = torch.zeros(shape, device=device, dtype=pipe.transformer.dtype)
            attend(query, query, query)
        except (ValueError, RuntimeError, ImportError) as error:
            raise UserError(f"attention_backend {attention_backend} on {device.type}: {one_line(error)}") from error
