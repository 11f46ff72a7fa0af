"""LightVAE's file: Wan2.1's autoencoder under its original names, of other widths. diffusers reads it as docs say."""

import re

import pytest
import torch
from diffusers import AutoencoderKLWan

from astrolabe_diffusers import StreamingVAEDecoder


_IN_BLOCK = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
_IN_BLOCK |= {"conv_shortcut": "shortcut"}
_OUTSIDE = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}
_OUTSIDE |= {f"mid_block.{new}": f"middle.{i}" for i, new in enumerate(("resnets.0", "attentions.0", "resnets.1"))}


def original_name(name: str) -> str:
    """Of a tensor of diffusers' autoencoder. The original decoder numbers its layers through, four a level."""
    name = re.sub(r"^quant_conv", "conv1", re.sub(r"^post_quant_conv", "conv2", name))
    name = name.replace("down_blocks", "downsamples")
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"upsamples.{4 * int(m[1]) + 3}", name)
    for new, old in _OUTSIDE.items():
        name = re.sub(rf"^(encoder|decoder)\.{re.escape(new)}\b", rf"\1.{old}", name)
    for new, old in _IN_BLOCK.items():
        name = re.sub(rf"((?:samples|middle)\.\d+)\.{new}\b", rf"\1.{old}", name)
    return name


@pytest.mark.parametrize("width", [24, 8])
def test_light_vae(tmp_path, width):
    vae = AutoencoderKLWan(base_dim=width).eval()
    tensors = {original_name(name): tensor for name, tensor in vae.state_dict().items()}
    known = {"decoder.upsamples.3.time_conv.weight", "decoder.upsamples.4.shortcut.weight", "conv2.bias"}
    known |= {"encoder.downsamples.0.residual.3.gamma", "decoder.middle.1.to_qkv.weight", "encoder.head.2.weight"}
    assert known <= tensors.keys() and len(tensors) == len(vae.state_dict())
    torch.save(tensors, tmp_path / "lightvaew2_1.pth")
    AutoencoderKLWan(base_dim=4).save_config(tmp_path / "base" / "vae")
    loaded = AutoencoderKLWan.from_single_file(
        str(tmp_path / "lightvaew2_1.pth"), config=str(tmp_path / "base"), subfolder="vae", base_dim=width
    )
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in vae.state_dict().items())
    latents = torch.randn(1, 16, 2, 2, 2)
    assert torch.equal(StreamingVAEDecoder(loaded).decode(latents), StreamingVAEDecoder(vae).decode(latents))
