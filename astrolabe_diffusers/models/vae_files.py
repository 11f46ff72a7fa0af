"""Wan autoencoders in their original files, of any width."""

from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

from ..layouts.tensor_files import load_tensors, misfits, select_weights


def load_vae_file(path: str | PathLike, config: Mapping[str, Any], dtype: torch.dtype) -> AutoencoderKLWan:
    """
    The autoencoder in a safetensors or torch file under its original names, such as LightVAE's
    (https://huggingface.co/lightx2v/Autoencoders), which is Wan2.1's at a quarter of the width.

    Widths are read off its tensors, all else is that of `config`, of the autoencoder in whose place it goes.

    Raises:
        ValueError: the file is no such autoencoder; tensors are missing, unexpected or of another shape.
        OSError: it cannot be read.
    """
    tensors = convert_wan_vae_to_diffusers(select_weights(load_tensors(path)))
    first = {half: tensors.get(f"{half}.conv_in.weight") for half in ("encoder", "decoder")}
    if missing := [half for half, weight in first.items() if weight is None]:
        raise ValueError(f"{path} is no autoencoder of Wan: it has no {missing[0]}.conv1.weight.")
    widths = {"base_dim": len(first["encoder"]), "decoder_base_dim": len(first["decoder"]) // config["dim_mult"][-1]}
    with init_empty_weights():
        vae = AutoencoderKLWan.from_config(config, **widths)
    if found := misfits(tensors, {name: tensor.shape for name, tensor in vae.state_dict().items()}):
        raise ValueError(f"{path} does not fit an autoencoder of width {widths['base_dim']}: {found}.")
    # A copy: the file may be replaced while its memory map is in use.
    vae.load_state_dict({name: tensor.to(dtype, copy=True) for name, tensor in tensors.items()}, assign=True)
    return vae.eval()
