"""Our encoder against `AutoencoderKLWan.encode`, in float64 but for rounding of that."""

import itertools

import pytest
import torch

from astrolabe_diffusers.models import vae_encoder, vae_layers, vae_operations
from astrolabe_diffusers.models.vae_encoder import encode_piece
from astrolabe_diffusers.models.vae_operations import lay_out
from tests.tiny_pipeline import random_vae


pytestmark = pytest.mark.usefixtures("diffusers_norm", "no_grad")
CONFIGS = {
    "wan2.1": dict(),
    "its multiples": dict(dim_mult=[1, 2, 4, 4], num_res_blocks=2),
    "LightVAE's widths": dict(base_dim=6, dim_mult=[1, 1, 2, 2]),
    "no blocks": dict(num_res_blocks=0),
    "other frames": dict(temperal_downsample=[True, False, True]),
    "no frames": dict(temperal_downsample=[False, False, False]),
    "three levels": dict(dim_mult=[1, 2, 2], temperal_downsample=[True, True]),
    "one level": dict(dim_mult=[2], temperal_downsample=[]),
    "patched": dict(patch_size=2, in_channels=12),
    "wan2.2": dict(patch_size=2, in_channels=12, is_residual=True, dim_mult=[1, 2, 4, 4]),
    "wan2.2, other frames": dict(is_residual=True, temperal_downsample=[True, False, False], num_res_blocks=2),
    "wan2.2, no blocks": dict(is_residual=True, num_res_blocks=0),
    "tiny_shapes": dict(patch_size=4, in_channels=48, is_residual=True, dim_mult=[1, 2, 2], base_dim=8)
    | dict(temperal_downsample=[True, True]),
}


def random_video(frames=13, batch=2, height=16, width=32):
    return torch.rand(batch, 3, frames, height, width, dtype=torch.float64) * 2 - 1


def encode(vae, video, sizes) -> torch.Tensor:
    memory, latents = {}, []
    for piece in video.split(sizes, dim=2):
        latents.append(encode_piece(vae, piece, memory))
    return torch.cat(latents, dim=2)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("laid_out", [False, True])
def test_equals_diffusers(config, laid_out):
    vae, video = random_vae(**CONFIGS[config]), random_video()
    expected = vae.encode(video).latent_dist.mode()
    assert expected.std() > 0.05 and (expected[:, :, 0] - expected[:, :, -1]).abs().max() > 0.05
    if laid_out:
        lay_out(vae.encoder)
    for sizes in (13, [1, 4, 4, 4], [1, 12], [5, 8]):
        assert (encode(vae, video, sizes) - expected).abs().max() < 1e-10


def test_a_size_that_is_halved_with_a_remainder():
    vae, video = random_vae(), random_video(5, height=43, width=30)
    expected = vae.encode(video).latent_dist.mode()
    assert expected.shape[3:] == (5, 3)
    assert (encode(vae, video, [1, 4]) - expected).abs().max() < 1e-10


@pytest.mark.parametrize("config", ["wan2.1", "wan2.2"])
def test_the_past_matters(config):
    """The equality above is not one of independent pieces."""
    vae, video = random_vae(**CONFIGS[config]), random_video(9)
    whole = encode(vae, video, 9)
    video[:, :, :4] = 0
    assert (encode(vae, video, 9) - whole)[:, :, 2].abs().max() > 1e-3
    video[:, :, 4:] = 0
    assert (encode(vae, video, 9) - whole)[:, :, 1].abs().max() > 1e-3


@pytest.mark.parametrize("config", ["its multiples", "wan2.2"])
def test_float32(config):
    vae, video = random_vae(**CONFIGS[config]).float(), random_video(9).float()
    expected = vae.encode(video).latent_dist.mode()
    assert (encode(vae, video, 9) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("config", ["its multiples", "wan2.2", "LightVAE's widths", "tiny_shapes"])
def test_bfloat16_is_no_further_than_diffusers(config):
    vae, video = random_vae(**CONFIGS[config]), random_video(9).bfloat16()
    exact = vae.encode(video.double()).latent_dist.mode()
    vae.bfloat16()
    theirs, ours = vae.encode(video).latent_dist.mode(), encode(vae, video, [5, 4])
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).norm() <= 1.1 * (theirs - exact).norm()


@pytest.mark.parametrize("config", ["wan2.1", "wan2.2", "wan2.2, no blocks"])
def test_as_on_a_gpu(config, monkeypatch):
    """Convolutions in three dimensions for the wider layers, and biases that the next pass adds."""
    vae, video = random_vae(**CONFIGS[config]), random_video(9)
    expected = encode(vae, video, [1, 8])
    monkeypatch.setattr(vae_operations, "on_gpu", lambda x: True)
    monkeypatch.setattr(vae_operations, "STACKED_CHANNELS", 4)
    for module, name in itertools.product((vae_layers, vae_encoder), ("stack", "add")):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, getattr(vae_operations, name).__wrapped__)
    lay_out(vae.encoder)
    assert (encode(vae, video, [1, 8]) - expected).abs().max() < 1e-10


def test_what_is_remembered_can_be_copied():
    """A copy of a memory can be gone on from again: its tensors are replaced, not written to; nor is the video."""
    vae, video, memory = random_vae(), random_video(9), {}
    given = video.clone()
    encode_piece(vae, video[:, :, :5], memory)
    kept = dict(memory)
    first = encode_piece(vae, video[:, :, 5:], memory)
    assert torch.equal(first, encode_piece(vae, video[:, :, 5:], kept)) and torch.equal(video, given)


def test_weights_that_are_replaced():
    vae, video = random_vae(), random_video(5)
    lay_out(vae.encoder)
    before, other = encode(vae, video, 5), random_vae()
    expected = encode(other, video, 5)
    assert (before - expected).abs().max() > 0.05
    vae.load_state_dict(other.state_dict())
    assert (encode(vae, video, 5) - expected).abs().max() < 1e-10
