"""The yardstick of training computes our gradients with the noisy context: in float32 up to rounding."""

from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator

from astrolabe_diffusers.training.nft.trainer import accumulate_gradients
from astrolabe_diffusers.training.policies import policy_parameters
from tests.training.helpers import config, noised_batch, policy_pipeline


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
