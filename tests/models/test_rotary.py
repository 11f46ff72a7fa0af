"""Rotated queries and keys, as a CPU makes them and as what is compiled does."""

import math

import pytest
import torch

from astrolabe_diffusers.models.rotary import apply_rotary


def rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """By a 2 x 2 matrix a pair, in float64."""
    matrices = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], dim=-1).unflatten(-1, (2, 2))
    return (matrices @ x.double().unflatten(-1, (-1, 2, 1))).flatten(-3)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_pairs_are_rotated(dtype, compiled, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    angles = 2 * math.pi * torch.rand(1, 5, 1, 8, dtype=torch.float64)
    # Of keys that lie between others, as those of a cache do.
    x = torch.randn(2, 9, 6, 16).to(dtype)[:, 2:7, 1:4].requires_grad_()
    cos, sin = angles.cos().float(), angles.sin().float()
    y = apply_rotary(x, (cos, sin))
    assert y.dtype == dtype
    # Angles are float32 whatever is rotated.
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y.double(), rotated(x, angles), **tolerance)
    weights = torch.randn(y.shape).to(dtype)
    (y * weights).sum().backward()
    torch.testing.assert_close(x.grad.double(), rotated(weights, -angles), **tolerance)
