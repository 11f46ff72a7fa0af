"""The yardstick of training computes our gradients with the noisy context: in float32 up to rounding."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from accelerate import Accelerator

from astrolabe_diffusers.pipelines.loading import load_from
from astrolabe_diffusers.training.nft.trainer import accumulate_gradients
from astrolabe_diffusers.training.policies import add_policies, policy_parameters
from tests.training.helpers import config, noised_batch, policy_pipeline, randomize_adapters


# Five blocks of three frames, or fifteen of one; a window has no sink in training.
CASES = {
    "unlimited": {},
    "one frame a block": {"num_frames_per_block": 1},
    "window": {"local_attn_size": 6},
    "window and sink": {"local_attn_size": 7, "sink_size": 1, "num_frames_per_block": 1},
    "relative positions": {"local_attn_size": 6, "sink_size": 3, "rope_mode": "relative"},
    "no norm before the text": {"cross_attn_norm": False},
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_gradient(case):
    from published_training import PublishedTraining

    pipe = policy_pipeline(vae_num_res_blocks=0, **CASES[case])
    batch, cfg = noised_batch(pipe, frames=15), config(context="noisy")
    batch.weight, batch.kl_weight = torch.tensor([1.0, 0.5]), torch.tensor([0.25, 1.0])
    parameters = policy_parameters(pipe.transformer)
    sums = accumulate_gradients(Accelerator(mixed_precision="no"), pipe.transformer, batch, cfg, 3, True)
    expected = [parameter.grad.clone() for parameter in parameters]
    pipe.transformer.zero_grad()
    published = PublishedTraining(pipe.transformer, cfg, batch.clean.shape[2:], nullcontext)
    loss = published.accumulate_gradients(batch, 3)
    assert min(gradient.abs().max() for gradient in expected) > 1e-6
    torch.testing.assert_close(loss, sums["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close([parameter.grad for parameter in parameters], expected, rtol=1e-4, atol=1e-6)


def test_the_precision_of_published_runs(model_folder):
    """With the model in bfloat16 and the LoRA in float32 under autocast: gradients in float32, as near as ours."""
    from published_training import PublishedTraining

    gradients = {}
    for dtype in (torch.float32, torch.bfloat16):
        pipe = load_from(str(model_folder), dtype=dtype)
        torch.manual_seed(0)
        add_policies(pipe.transformer, rank=4, lora_alpha=8)
        randomize_adapters(pipe.transformer)
        batch, cfg, forward = noised_batch(pipe), config(context="noisy"), pipe.transformer.forward
        autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
        published = PublishedTraining(pipe.transformer, cfg, batch.clean.shape[2:], autocast)
        published.accumulate_gradients(batch, 2)
        theirs = [parameter.grad.clone() for parameter in policy_parameters(pipe.transformer)]
        pipe.transformer.zero_grad()
        pipe.transformer.forward = autocast()(forward)
        accumulate_gradients(Accelerator(mixed_precision="no"), pipe.transformer, batch, cfg, 2, True)
        ours = [parameter.grad for parameter in policy_parameters(pipe.transformer)]
        assert {gradient.dtype for gradient in theirs} == {torch.float32}
        gradients[dtype] = [torch.cat([g.flatten() for g in found]) for found in (theirs, ours)]
    exact = gradients[torch.float32][1]
    theirs, ours = ((gradient - exact).norm() / exact.norm() for gradient in gradients[torch.bfloat16])
    assert 1e-3 < theirs < 2 * ours < 0.2, (theirs, ours)


@pytest.mark.parametrize("window", [None, 60, 30])
def test_the_mask(window, no_grad):
    """Of both kernels, against a loop over the blocks."""
    from published_training import BlockCausalAttention

    query, key, value = torch.randn(3, 2, 150, 2, 16)
    seen = [(0 if window is None else max(0, end - window), end) for end in range(30, 151, 30)]
    expected = []
    for first, end in seen:
        inputs = query[:, end - 30 : end], key[:, first:end], value[:, first:end]
        attended = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs))
        expected.append(attended.transpose(1, 2))
    for flex in (False, True):
        attend = BlockCausalAttention(150, 30, window, torch.device("cpu"), flex)
        torch.testing.assert_close(attend(query, key, value), torch.cat(expected, dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_flex_attention_has_the_gradient_of_plain_attention():
    """Compiled, with the sizes of a small clip; on a CPU it has none."""
    from published_training import BlockCausalAttention

    inputs = torch.randn(4, 1, 300, 2, 64, device="cuda", dtype=torch.bfloat16)
    found = {}
    for flex in (False, True):
        attend = BlockCausalAttention(300, 60, 120, torch.device("cuda"), flex)
        *inputs_of_it, gradient = (x.clone() for x in inputs)
        for x in inputs_of_it:
            x.requires_grad_()
        attended = attend(*inputs_of_it)
        found[flex] = [attended, *torch.autograd.grad(attended, inputs_of_it, gradient)]
    for theirs, plain in zip(found[True], found[False]):
        assert (theirs - plain).norm() < 0.01 * plain.norm()
