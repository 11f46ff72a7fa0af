"""The passes of a Wan block against slow formulas, and their kernels against them."""

import pytest
import torch
from diffusers.models.normalization import FP32LayerNorm
from torch import nn

from astrolabe_diffusers.models import attention, block_operations, checked_kernels
from astrolabe_diffusers.models.block_operations import add_gated, norm_and_modulate, norm_and_rotate
from tests.tiny_pipeline import tiny_transformer


def modulations(videos, frames, dim, **kwargs):
    """As a block has them: slices of one tensor."""
    return torch.randn(videos, frames, 6, dim, **kwargs).chunk(6, dim=2)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("frames", [1, 3])
def test_norm_and_modulate(affine, frames, no_grad):
    norm, x = FP32LayerNorm(8, eps=1e-6, elementwise_affine=affine), torch.randn(2, 6, 8)
    scale, shift, *_ = modulations(2, frames, 8)
    if affine:
        norm.weight.normal_(), norm.bias.normal_()
    result = norm_and_modulate(norm, x, scale, shift)
    for video in range(2):
        for token in range(6):
            values, frame = x[video, token].double(), token * frames // 6
            values = (values - values.mean()) / (values.var(correction=0) + 1e-6).sqrt()
            if affine:
                values = values * norm.weight.double() + norm.bias.double()
            values = values * (1 + scale[video, frame, 0].double()) + shift[video, frame, 0].double()
            assert (result[video, token] - values).abs().max() < 1e-5


def test_add_gated():
    x, y = torch.randn(2, 2, 6, 8)
    gate = modulations(2, 3, 8)[4]
    expected = torch.stack([x[:, t] + gate[:, t // 2, 0] * y[:, t] for t in range(6)], dim=1)
    assert torch.allclose(add_gated(x, y, gate), expected, atol=1e-6)


def test_norm_and_rotate(no_grad):
    """Neighbours are the parts of a complex number, which is turned."""
    norm, x, angles = nn.RMSNorm(12, eps=1e-6), torch.randn(2, 5, 12), torch.randn(1, 5, 1, 3)
    norm.weight.normal_()
    result = norm_and_rotate(norm, x, (angles.cos(), angles.sin()), num_heads=2)
    normed = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    numbers = torch.view_as_complex(normed.unflatten(2, (2, 3, 2)))
    expected = torch.view_as_real(numbers * torch.polar(torch.ones(()).double(), angles.double())).flatten(3)
    assert torch.allclose(result.double(), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["norm1", "norm2", "norm3", "attn1.norm_q", "attn1.norm_k"])
@pytest.mark.parametrize("change", ["hook", "forward", "class"])
def test_a_norm_of_ones_own_is_called(name, change, no_grad):
    transformer = tiny_transformer(num_layers=1)
    norm = transformer.blocks[0].get_submodule(name)
    inputs = torch.randn(1, 4, 3, 4, 4), torch.full((1,), 500.0), torch.randn(1, 5, 32)
    expected = transformer(*inputs).sample
    if change == "hook":
        norm.register_forward_hook(lambda module, args, output: 2 * output)
    elif change == "forward":
        norm.forward = lambda x, forward=norm.forward: 2 * forward(x)
    else:
        forward = type(norm).forward
        norm.__class__ = type("Own", (type(norm),), {"forward": lambda self, x: 2 * forward(self, x)})
    assert not torch.allclose(transformer(*inputs).sample, expected, atol=1e-4)


def test_backward_hooks_of_a_norm_run():
    transformer, calls = tiny_transformer(num_layers=1), []
    for name in ("norm1", "norm2", "attn1.norm_q"):
        norm = transformer.blocks[0].get_submodule(name)
        norm.register_full_backward_hook(lambda module, *gradients, name=name: calls.append(name))
    inputs = torch.randn(1, 4, 3, 4, 4).requires_grad_(), torch.full((1,), 500.0), torch.randn(1, 5, 32)
    transformer(*inputs).sample.sum().backward()
    assert sorted(calls) == ["attn1.norm_q", "norm1", "norm2"]


@pytest.mark.gpu
@torch.no_grad()
def test_kernels_hold_under_autocast(caplog):
    """Newer torch norms in float32 there."""
    norm = nn.RMSNorm(32, eps=1e-6).to("cuda", torch.bfloat16)
    x, angles = torch.randn(1, 6, 32, device="cuda", dtype=torch.bfloat16), torch.randn(1, 6, 1, 8, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert norm_and_rotate(norm, x, (angles.cos(), angles.sin()), num_heads=2).dtype == x.dtype
    assert not caplog.records


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim,heads", [(1536, 12), (96, 3), (5120, 40)])
@pytest.mark.parametrize("videos,frames,tokens", [(1, 3, 52), (2, 2, 7), (2, 1, 9)])
def test_kernels(dtype, dim, heads, videos, frames, tokens, no_grad):
    from astrolabe_diffusers.models import block_kernels

    def check(name, *args):
        result = getattr(block_kernels, name)(*args)
        expected = getattr(block_operations, name).__wrapped__(*args)
        assert result.shape == expected.shape and result.dtype == expected.dtype
        assert checked_kernels._difference(result, expected) <= 1

    device = {"device": "cuda"}
    x, y = torch.randn(2, videos, frames * tokens, dim, dtype=dtype, **device)
    weight, bias = torch.randn(2, dim, dtype=dtype, **device)
    scale, shift, gate, *_ = modulations(videos, frames, dim, **device)
    for parameters in ((None, None), (weight, bias), (weight.float(), bias.float())):
        for modulation in ((None, None), (scale, shift), (scale[:, :1], shift[:, :1]), (scale[:1], shift[:1])):
            check("layer_norm_and_modulate", x, *parameters, *modulation, 1e-6)
    for part in (gate, gate[:, :1], gate[:1]):
        check("add_gated", x, y, part)
    angles = torch.randn(1, frames * tokens, 1, dim // heads // 2, **device)
    check("rms_norm_and_rotate", x, weight, angles.cos(), angles.sin(), heads, 1e-6)
    # The end of a longer sequence, as of two blocks in a pass.
    check("add_gated", x[:, -tokens:], y[:, -tokens:], gate[:, :1])


@pytest.mark.gpu
def test_gradients_are_the_plain_ones():
    x = torch.randn(1, 6, 32, device="cuda", requires_grad=True)
    y, (gate, *_) = torch.randn(1, 6, 32, device="cuda"), modulations(1, 3, 32, device="cuda")
    add_gated(x, y, gate).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    norm = FP32LayerNorm(32, elementwise_affine=True).cuda()
    norm_and_modulate(norm, y).square().sum().backward()
    assert norm.weight.grad is not None


@pytest.mark.gpu
def test_a_pass_is_no_further_from_float32_than_without_kernels(no_grad, monkeypatch):
    """Of a model of full width, with blocks before it whose keys go in parts."""
    sizes = dict(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=2)
    transformer = tiny_transformer(**sizes).cuda()
    blocks, text = torch.randn(5, 1, 4, 3, 60, 104, device="cuda"), torch.randn(1, 16, 32, device="cuda")

    def flow(transformer, dtype):
        cache, time = transformer.new_kv_cache(max_frames=15), torch.zeros(1, device="cuda")
        for i, block in enumerate(blocks):
            arguments = dict(kv_cache=cache, kv_cache_mode="write", frame_offset=3 * i, return_dict=False)
            result = transformer(block.to(dtype), time, text.to(dtype), **arguments)[0]
        return result.float()

    exact = flow(transformer, torch.float32)
    transformer.to(torch.bfloat16)
    error = (flow(transformer, torch.bfloat16) - exact).norm() / exact.norm()
    monkeypatch.setattr(checked_kernels, "on_gpu", lambda x: False)
    monkeypatch.setattr(attention, "num_parts", lambda *sizes: 1)
    plain_error = (flow(transformer, torch.bfloat16) - exact).norm() / exact.norm()
    assert error <= 1.02 * plain_error
