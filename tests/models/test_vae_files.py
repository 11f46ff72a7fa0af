"""Autoencoders under their original names, of any width, against diffusers' own loader and decoder."""

import pytest
import torch
from diffusers import AutoencoderKLWan

from astrolabe_diffusers import StreamingVAEDecoder
from astrolabe_diffusers.models.vae_files import load_vae_file
from tests.layouts.test_wan_autoencoder import original_name


# Wan2.1's, but for its width.
WAN = AutoencoderKLWan(base_dim=4).config


def original_file(path, vae):
    torch.save({original_name(name): tensor for name, tensor in vae.state_dict().items()}, path)
    return path


@pytest.mark.parametrize("width", [24, 8])
@torch.no_grad()
def test_light_vae(width, tmp_path):
    """LightVAE has a width of 24. Our decoder of it is diffusers'."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=width).eval()
    loaded = load_vae_file(original_file(tmp_path / "lightvaew2_1.pth", vae), WAN, torch.float32)
    assert loaded.config.base_dim == width and not loaded.training
    assert loaded.state_dict().keys() == vae.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in vae.state_dict().items())
    latents = torch.randn(1, 16, 3, 2, 2)
    mean, std = (torch.tensor(WAN[name]).view(1, 16, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    expected = vae.decode(latents * std + mean).sample
    for sizes in (3, [1, 2]):
        decoder = StreamingVAEDecoder(loaded)
        frames = torch.cat([decoder.decode(piece) for piece in latents.split(sizes, dim=2)], dim=2)
        assert frames.shape == (1, 3, 9, 16, 16) and expected.std() > 1e-3
        assert (frames - expected).abs().max() < 1e-5
    assert load_vae_file(tmp_path / "lightvaew2_1.pth", WAN, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("decoder.head.2.bias"), r"autoencoder of width 4: 1 missing \(decoder.conv_out.bias\)"),
        (lambda w: w.update({"encoder.extra": torch.zeros(1)}), r"1 unexpected \(encoder.extra\)"),
        (lambda w: w.update({"conv2.bias": torch.zeros(3)}), r"of another shape \(post_quant_conv.bias \(3,\) for"),
        (lambda w: w.pop("decoder.conv1.weight"), "no autoencoder of Wan: it has no decoder.conv1.weight"),
    ],
)
def test_strict(change, message, tmp_path):
    weights = {original_name(name): tensor for name, tensor in AutoencoderKLWan.from_config(WAN).state_dict().items()}
    change(weights)
    torch.save(weights, tmp_path / "vae.pt")
    with pytest.raises(ValueError, match=message):
        load_vae_file(tmp_path / "vae.pt", WAN, torch.float32)
