"""Our decoder against `AutoencoderKLWan.decode`, in float64 but for rounding of that."""

import itertools

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanUpsample
from torch import nn

from astrolabe_diffusers.models import vae_decoder, vae_layers, vae_operations
from astrolabe_diffusers.models.module_calls import has_hooks
from astrolabe_diffusers.models.vae_decoder import decode_piece, decode_piece_by_calls
from astrolabe_diffusers.models.vae_operations import lay_out, unpatchify
from tests.tiny_pipeline import random_vae


CONFIGS = {
    "wan2.1": dict(),
    "LightVAE's widths": dict(base_dim=6, dim_mult=[1, 1, 2, 2]),
    "a wider decoder": dict(decoder_base_dim=6, dim_mult=[1, 2, 2, 2]),
    "no more blocks": dict(num_res_blocks=0),
    "many blocks": dict(num_res_blocks=2, attn_scales=[0.25, 1.0]),
    "other frames": dict(temperal_downsample=[True, False, True]),
    "no frames": dict(temperal_downsample=[False, False, False]),
    "three levels": dict(dim_mult=[1, 2, 2], temperal_downsample=[True, True]),
    "patched": dict(patch_size=2, out_channels=12),
    "wan2.2": dict(patch_size=2, out_channels=12, is_residual=True, dim_mult=[1, 2, 4, 4]),
    "wan2.2, other frames": dict(is_residual=True, temperal_downsample=[True, False, False], decoder_base_dim=8),
}


@pytest.fixture(autouse=True)
def exact(diffusers_norm, monkeypatch):
    """diffusers upsamples in float32, whatever it is given."""
    monkeypatch.setattr(WanUpsample, "forward", nn.Upsample.forward)
    with torch.no_grad():
        yield


def decode(vae, latents, sizes, decode_piece=decode_piece) -> torch.Tensor:
    memory, frames = {}, []
    for piece in latents.split(sizes, dim=2):
        frames.append(unpatchify(decode_piece(vae, piece, memory), vae.config.patch_size or 1))
    return torch.cat(frames, dim=1).clamp(-1, 1).permute(0, 4, 1, 2, 3)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("laid_out", [False, True])
def test_equals_diffusers(config, laid_out):
    vae = random_vae(**CONFIGS[config])
    latents = torch.randn(2, 4, 4, 3, 5, dtype=torch.float64)
    expected = vae.decode(latents).sample
    assert expected.std() > 0.05 and (expected[:, :, 0] - expected[:, :, -1]).abs().max() > 0.05
    if laid_out:
        lay_out(vae.decoder)
    for sizes in (4, [1, 3], [2, 1, 1]):
        assert (decode(vae, latents, sizes) - expected).abs().max() < 1e-10


def test_float32():
    vae = random_vae(base_dim=8, dim_mult=[1, 2, 4, 4]).float()
    latents = torch.randn(1, 4, 3, 4, 6)
    expected = vae.decode(latents).sample
    assert (decode(vae, latents, 3) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("config", ["wan2.2", "LightVAE's widths"])
def test_bfloat16_is_no_further_than_diffusers(config):
    vae, latents = random_vae(**CONFIGS[config]), torch.randn(2, 4, 3, 4, 6).bfloat16()
    exact = vae.decode(latents.double()).sample
    vae.bfloat16()
    theirs, ours = vae.decode(latents).sample, decode(vae, latents, [2, 1])
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).norm() <= 1.1 * (theirs - exact).norm()


def test_autocast_changes_nothing():
    vae, latents = random_vae().float(), torch.randn(1, 4, 2, 3, 4)
    expected = decode(vae, latents, [1, 1])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(decode(vae, latents, [1, 1]), expected)


@pytest.mark.parametrize("config", ["wan2.1", "wan2.2"])
def test_as_on_a_gpu(config, monkeypatch):
    """Convolutions in three dimensions for the wider layers, and biases that the next pass adds."""
    vae, latents = random_vae(**CONFIGS[config]), torch.randn(2, 4, 3, 3, 5, dtype=torch.float64)
    expected = decode(vae, latents, [2, 1])
    monkeypatch.setattr(vae_operations, "on_gpu", lambda x: True)
    monkeypatch.setattr(vae_operations, "STACKED_CHANNELS", 4)
    for module, name in itertools.product((vae_layers, vae_decoder), ("stack", "add", "spread")):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, getattr(vae_operations, name).__wrapped__)
    lay_out(vae.decoder)
    assert (decode(vae, latents, [2, 1]) - expected).abs().max() < 1e-10


def test_what_is_remembered_can_be_copied():
    """A copy of a memory can be gone on from again: its tensors are replaced, not written to."""
    vae, latents, memory = random_vae(), torch.randn(1, 4, 2, 3, 4, dtype=torch.float64), {}
    decode_piece(vae, latents[:, :, :1], memory)
    kept = dict(memory)
    first = decode_piece(vae, latents[:, :, 1:], memory)
    assert torch.equal(first, decode_piece(vae, latents[:, :, 1:], kept))


def test_weights_that_are_replaced():
    vae, latents = random_vae(), torch.randn(1, 4, 2, 3, 4, dtype=torch.float64)
    lay_out(vae.decoder)
    before = decode(vae, latents, 2)
    other = random_vae()
    expected = decode(other, latents, 2)
    assert (before - expected).abs().max() > 0.05
    for name, parameter in vae.named_parameters():
        parameter.data = other.get_parameter(name).data
    assert (decode(vae, latents, 2) - expected).abs().max() < 1e-10
    other = random_vae()
    vae.load_state_dict(other.state_dict())
    assert (decode(vae, latents, 2) - decode(other, latents, 2)).abs().max() < 1e-10


def test_laid_out_weights_are_saved(tmp_path):
    vae = random_vae()
    parameters = {name: parameter.clone() for name, parameter in vae.state_dict().items()}
    lay_out(vae)
    assert not vae.decoder.conv_in.weight.is_contiguous()
    vae.save_pretrained(tmp_path)
    for state in vae.state_dict(), AutoencoderKLWan.from_pretrained(tmp_path, dtype=torch.float64).state_dict():
        assert all(torch.equal(state[name], parameter) for name, parameter in parameters.items())


@pytest.mark.parametrize("config", ["wan2.1", "wan2.2"])
def test_by_calls(config):
    """What offloaded weights need: modules that are called."""
    vae, latents = random_vae(**CONFIGS[config]), torch.randn(2, 4, 4, 3, 5, dtype=torch.float64)
    expected = vae.decode(latents).sample
    assert not has_hooks(vae)
    vae.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    assert has_hooks(vae)
    for sizes in (4, [1, 3], [2, 1, 1]):
        assert (decode(vae, latents, sizes, decode_piece_by_calls) - expected).abs().max() < 1e-10
