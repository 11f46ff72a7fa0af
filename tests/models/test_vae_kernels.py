"""The Triton kernels against the plain passes, and the whole decoder and encoder on a GPU."""

import pytest
import torch
from diffusers import AutoencoderKLWan

from astrolabe_diffusers import StreamingVAEDecoder
from astrolabe_diffusers.models import checked_kernels, vae_operations
from astrolabe_diffusers.models.vae_decoder import decode_piece
from astrolabe_diffusers.models.vae_encoder import encode_piece
from astrolabe_diffusers.models.vae_streaming import encode_video
from tests.tiny_pipeline import LATENT_CHANNELS, tiny_vae


pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("diffusers_norm")]
DTYPES = torch.float32, torch.bfloat16, torch.float16
# Channels, videos, frames, height and width. Triton compiles another kernel for sizes of 1.
SHAPES = (96, 1, 4, 30, 41), (24, 2, 1, 7, 5), (3, 1, 3, 9, 11), (384, 2, 2, 8, 8), (1024, 1, 1, 5, 6), (4, 1, 1, 1, 1)


@pytest.fixture(autouse=True)
def no_grad(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with torch.no_grad():
        yield


def close(result: torch.Tensor, expected: torch.Tensor) -> bool:
    assert result.shape == expected.shape and result.dtype == expected.dtype and result.is_contiguous()
    return checked_kernels._difference(result, expected) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels(dtype, shape):
    from astrolabe_diffusers.models import vae_kernels

    def randn(*shape):
        return torch.randn(*shape, device="cuda", dtype=dtype)

    channels, videos, frames, height, width = shape
    x, residual = randn(2, videos, frames, height, width, channels).unbind(0)
    memory, (gamma, bias, other_bias) = randn(videos, 2, height, width, channels), randn(3, channels).unbind(0)
    for stacked in (True, False):
        for arguments in ((bias, gamma), (None, gamma), (None, None), (bias, None)):
            results = vae_kernels.stack(x, *arguments, memory, stacked)
            expected = vae_operations.stack.__wrapped__(x, *arguments, memory, stacked)
            assert all(close(*pair) for pair in zip(results, expected))
    for arguments in ((bias, residual, other_bias), (None, residual, None), (bias, residual, None)):
        expected = vae_operations.add.__wrapped__(x.clone(), *arguments)
        assert close(vae_kernels.add(x.clone(), *arguments), expected)
    for times in (1, 2) if channels % 2 == 0 else (1,):
        assert torch.equal(vae_kernels.spread(x, times), vae_operations.spread.__wrapped__(x, times))
    x = x.clamp(-1, 1)
    assert torch.equal(vae_kernels.to_uint8(x), vae_operations.to_uint8.__wrapped__(x))


@pytest.mark.parametrize("config", [{}, {"patch_size": 2, "is_residual": True}])
def test_the_video_of_the_cpu(config, caplog):
    vae, latents = tiny_vae(**config), torch.randn(2, LATENT_CHANNELS, 4, 5, 6)
    expected = StreamingVAEDecoder(vae).decode(latents)
    decoder = StreamingVAEDecoder(vae.to("cuda"))
    video = torch.cat([decoder.decode(piece) for piece in latents.cuda().split(2, dim=2)], dim=2)
    assert (video.cpu() - expected).abs().max() < 1e-4
    assert not caplog.records  # every kernel is trusted


@pytest.mark.parametrize("config", [{}, {"patch_size": 2, "is_residual": True}])
def test_the_latents_of_the_cpu(config, caplog):
    vae, video = tiny_vae(**config), torch.rand(2, 3, 9, 32, 48) * 2 - 1
    expected = encode_video(vae, video)
    latents = encode_video(vae.to("cuda"), video.cuda())
    assert (latents.cpu() - expected).abs().max() < 1e-4
    assert not caplog.records  # every kernel is trusted


def test_bfloat16_is_no_further_from_float32_than_diffusers():
    vae = AutoencoderKLWan(base_dim=96).cuda()
    latents = torch.randn(1, 16, 3, 16, 24, device="cuda")
    exact = vae.decode(latents).sample
    vae.bfloat16()
    theirs = vae.decode(latents.bfloat16()).sample
    ours = decode_piece(vae, latents.bfloat16(), {}).clamp(-1, 1).permute(0, 4, 1, 2, 3)
    assert (ours - exact).norm() <= 1.1 * (theirs - exact).norm()


def test_bfloat16_latents_are_no_further_from_float32_than_those_of_diffusers():
    vae = AutoencoderKLWan(base_dim=96).cuda()
    video = (torch.rand(1, 3, 9, 128, 192, device="cuda") * 2 - 1).bfloat16()
    exact = vae.encode(video.float()).latent_dist.mode()
    vae.bfloat16()
    theirs, ours = vae.encode(video).latent_dist.mode(), encode_piece(vae, video, {})
    assert (ours - exact).norm() <= 1.1 * (theirs - exact).norm()
