"""The plain passes against slow formulas."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders import autoencoder_kl_wan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from diffusers.video_processor import VideoProcessor

from astrolabe_diffusers.models import vae_operations
from astrolabe_diffusers.models.vae_operations import (
    add,
    convolve,
    convolve_images,
    lay_out,
    multiply,
    patchify,
    spread,
    stack,
    to_uint8,
    unpatchify,
)


pytestmark = pytest.mark.usefixtures("no_grad")


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_norm", [False, True])
def test_stack(frames, with_bias, with_norm):
    x, bias, gamma, memory = randn(2, frames, 3, 4, 6), randn(6), randn(6), randn(2, 2, 3, 4, 6)
    values = x + bias if with_bias else x
    if with_norm:
        values = values / values.square().sum(-1, keepdim=True).sqrt() * 6**0.5 * gamma
        values = values / (1 + (-values).exp())
    values = [*memory.unbind(1), *values.unbind(1)]
    arguments = (x, bias if with_bias else None, gamma if with_norm else None, memory)
    stacked, new_memory = stack(*arguments, True)
    assert stacked.shape == (2, frames, 3, 4, 18)
    for frame in range(frames):
        expected = torch.cat(values[frame : frame + 3], dim=-1)
        torch.testing.assert_close(stacked[:, frame], expected, rtol=0, atol=1e-12)
    padded, same_memory = stack(*arguments, False)
    torch.testing.assert_close(padded, torch.stack(values, dim=1), rtol=0, atol=1e-12)
    torch.testing.assert_close(new_memory, torch.stack(values[-2:], dim=1), rtol=0, atol=1e-12)
    assert torch.equal(new_memory, same_memory)


def test_the_norm_of_nothing_is_zero():
    stacked, _ = stack(torch.zeros(1, 1, 1, 1, 4), None, torch.ones(4), torch.zeros(1, 2, 1, 1, 4), True)
    assert torch.equal(stacked, torch.zeros(1, 1, 1, 1, 12))


def test_add():
    x, bias, residual, residual_bias = randn(2, 3, 4, 5, 6), randn(6), randn(2, 3, 4, 5, 6), randn(6)
    expected = x + bias + residual + residual_bias
    x, given = x.clone(), x.clone()
    assert (add(x, bias, residual, residual_bias) - expected).abs().max() < 1e-12
    assert torch.equal(add(given.clone(), None, residual, None), given + residual)


@pytest.mark.parametrize("times", [1, 2])
def test_spread(times):
    x = randn(2, 3, 4, 5, times * 6)
    out = spread(x, times)
    assert out.shape == (2, 3 * times, 8, 10, 6)
    for frame in range(3 * times):
        channels = x[:, frame // times, ..., frame % times * 6 : frame % times * 6 + 6]
        expected = F.interpolate(channels.permute(0, 3, 1, 2), scale_factor=2.0, mode="nearest-exact")
        assert torch.equal(out[:, frame], expected.permute(0, 2, 3, 1))


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patches(patch):
    x = randn(2, 3, 4, 5, 3 * patch**2)
    expected = autoencoder_kl_wan.unpatchify(x.permute(0, 4, 1, 2, 3), patch)
    frames = unpatchify(x, patch)
    assert torch.equal(frames, expected.permute(0, 2, 3, 4, 1))
    assert torch.equal(patchify(frames, patch), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_pipeline(dtype):
    """Ties and ends included."""
    x = torch.cat([torch.linspace(-1, 1, 9989), torch.tensor([0.0, 1, -1, 1 / 255, 3 / 255, -3 / 255, 0.5])]).to(dtype)
    x = x.view(1, 2, 2, -1, 3)
    frames = VideoProcessor().postprocess_video(x.permute(0, 4, 1, 2, 3), output_type="np")
    assert torch.equal(to_uint8(x), torch.from_numpy((frames * 255).round().astype("uint8")))


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("laid_out", [True, False])
def test_convolve(stacked, laid_out, monkeypatch):
    monkeypatch.setattr(vae_operations, "is_stacked", lambda conv: stacked)
    conv, x, memory = WanCausalConv3d(4, 6, 3, padding=1).double(), randn(2, 3, 5, 6, 4), randn(2, 2, 5, 6, 4)
    expected = conv(x.permute(0, 4, 1, 2, 3), memory.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
    if laid_out:
        lay_out(conv)
        # The formulation's weight is then no copy.
        assert not stacked or vae_operations.stacked_weight(conv).data_ptr() == conv.weight.data_ptr()
    frames, _ = stack(x, None, None, memory, stacked)
    y, bias = convolve(frames, conv)
    assert y.is_contiguous()
    assert (y + (0 if bias is None else bias) - expected).abs().max() < 1e-12


def test_channels_come_by_the_eight(monkeypatch):
    """And frames at a stride, as the encoder takes them."""
    conv, x = torch.nn.Conv2d(9, 6, 3, stride=2).double(), randn(2, 3, 5, 7, 9)
    expected = conv(x.flatten(0, 1).permute(0, 3, 1, 2)).unflatten(0, (2, 3)).permute(0, 1, 3, 4, 2)
    arguments = (x, conv.weight.permute(0, 2, 3, 1), conv.bias, 0, 2)
    assert (convolve_images(*arguments)[0] - expected).abs().max() < 1e-12
    channels, conv2d = [], F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda x, *args: channels.append(x.shape[1]) or conv2d(x, *args))
    monkeypatch.setattr(vae_operations, "on_gpu", lambda x: True)
    y, bias = convolve_images(*arguments)
    assert channels == [16] and (y + bias - expected).abs().max() < 1e-12


def test_weights_that_are_laid_out_in_inference_mode_can_be_trained():
    conv = torch.nn.Conv3d(96, 96, 3)
    with torch.inference_mode():
        lay_out(conv)
    assert not conv.weight.is_inference() and not conv.weight.is_contiguous()
    with torch.enable_grad():
        conv(torch.rand(1, 96, 3, 4, 4)).sum().backward()
    assert conv.weight.grad.isfinite().all()


def test_multiply():
    x, memory = randn(2, 3, 5, 6, 4), randn(2, 2, 5, 6, 4)
    for conv in WanCausalConv3d(4, 6, 1), torch.nn.Conv2d(4, 6, 1):
        conv, frames = conv.double(), x.permute(0, 4, 1, 2, 3)
        if isinstance(conv, torch.nn.Conv2d):
            expected = conv(frames.transpose(1, 2).flatten(0, 1)).unflatten(0, (2, 3)).transpose(1, 2)
        else:
            expected = conv(frames)
        assert (multiply(x, conv) - expected.permute(0, 2, 3, 4, 1)).abs().max() < 1e-12
    conv = WanCausalConv3d(4, 8, (3, 1, 1), padding=(1, 0, 0)).double()
    expected = conv(x.permute(0, 4, 1, 2, 3), memory.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
    assert (multiply(stack(x, None, None, memory, True)[0], conv) - expected).abs().max() < 1e-12
