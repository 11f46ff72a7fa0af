"""Attention in parts: the same result, in fewer or fuller waves."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from astrolabe_diffusers.models.attention import attend, attend_in_parts, merge, num_parts


HEADS, HEAD_DIM, PROCESSORS = 12, 128, 132  # Wan 1.3B on an H100


@pytest.mark.parametrize("parts", [2, 3, 5])
@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
def test_parts_are_the_whole(parts, scale, no_grad):
    """Against one softmax over all keys, in float64; scores from tiny to large, keys as a view into a buffer."""
    generator = torch.Generator().manual_seed(0)
    query = scale * torch.randn(1, 7, 2, 8, generator=generator)
    key, value = torch.randn(2, 1, 40, 2, 8, generator=generator)[:, :, 10:].unbind(0)
    scores = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()) / 8**0.5
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value.double())
    result = attend_in_parts(query, key, value, parts)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5)


def test_merging_never_overflows():
    outputs, logsumexp = torch.randn(2, 3, 1, 4), torch.tensor([[-1e4, 0.0, 1e4], [1e4, 0.0, 1e4 - 1]]).unsqueeze(-1)
    merged = merge(outputs, logsumexp)
    e = torch.tensor(1.0).exp()
    expected = torch.stack([outputs[1, 0], outputs[:, 1].mean(0), (e * outputs[0, 2] + outputs[1, 2]) / (e + 1)])
    torch.testing.assert_close(merged, expected)


def test_no_part_where_waves_are_full():
    assert num_parts(128 * 11, 30_000, HEADS, HEAD_DIM, PROCESSORS) == 1
    # Many queries: what the last wave lacks is little.
    assert num_parts(32_760, 32_760, HEADS, HEAD_DIM, PROCESSORS) == 1


def test_parts_fill_the_last_wave():
    """A block of three latent frames in four waves or three and a half; one of one frame in two or 1.2."""
    assert num_parts(4680, 32_760, HEADS, HEAD_DIM, PROCESSORS) == 2
    assert num_parts(1560, 32_760, HEADS, HEAD_DIM, PROCESSORS) == 5
    # Few keys are read sooner than merged.
    assert num_parts(4680, 4680, HEADS, HEAD_DIM, PROCESSORS) == 1
    assert num_parts(1560, 32_761, HEADS, HEAD_DIM, PROCESSORS) == 1


def whole(query, key, value):
    """By torch, on the kernel that is taken."""
    kernel = SDPBackend.EFFICIENT_ATTENTION if query.dtype == torch.float32 else SDPBackend.CUDNN_ATTENTION
    with sdpa_kernel(kernel):
        return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu(caplog):
    generator = torch.Generator("cuda").manual_seed(0)
    query = torch.randn(1, 1560, HEADS, HEAD_DIM, device="cuda", generator=generator)
    key, value = torch.randn(2, 1, 31_200, HEADS, HEAD_DIM, device="cuda", generator=generator)[:, :, 1560:].unbind(0)
    exact = whole(query, key, value)
    assert torch.equal(attend(query, key, value), exact)  # cuDNN takes no float32
    query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
    plain, result = whole(query, key, value), attend(query, key, value)
    assert not torch.equal(result, plain) and result.is_contiguous()
    error, plain_error = (((x - exact).norm() / exact.norm()).item() for x in (result, plain))
    assert error < 1.3 * plain_error  # it rounds once more
    assert not caplog.records  # the kernel is trusted
    # Few keys, and several videos.
    assert torch.equal(attend(query, key[:, :1560], value[:, :1560]), whole(query, key[:, :1560], value[:, :1560]))
    several = [x.expand(2, -1, -1, -1) for x in (query, key, value)]
    assert torch.equal(attend(*several), whole(*several))


@pytest.mark.gpu
@torch.no_grad()
def test_nothing_is_compiled_anew_as_keys_grow():
    torch._dynamo.reset()
    query = torch.randn(1, 1560, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(attend, fullgraph=True, dynamic=True)
    for count in (3120, 4680, 31_200):
        key = torch.randn(1, count, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        with torch._dynamo.config.patch(error_on_recompile=count > 3120):
            torch.testing.assert_close(compiled(query, key, key), attend(query, key, key), rtol=0, atol=0)
    torch._dynamo.reset()
