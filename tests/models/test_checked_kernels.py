"""Kernels that are checked at their first use."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch

from astrolabe_diffusers.models import checked_kernels
from astrolabe_diffusers.models.checked_kernels import with_kernel


def double(x, by):
    return x * by


@pytest.mark.parametrize(
    "kernel,warning",
    [
        (lambda x, by: x * by + 0.0, None),
        (lambda x, by: x.mul_(by), None),
        (lambda x, by: x + by, "off by"),
        (lambda x, by: x.missing, "AttributeError"),
    ],
)
def test_a_kernel_is_checked_once(kernel, warning, monkeypatch, caplog):
    calls = []

    def counted(x, by):
        calls.append(x.dtype)
        return kernel(x, by)

    monkeypatch.setattr(checked_kernels, "on_gpu", lambda x: True)
    fake = SimpleNamespace(double=counted)
    monkeypatch.setitem(sys.modules, "astrolabe_diffusers.models.fake_kernels", fake)
    run = with_kernel("fake_kernels")(double)
    with caplog.at_level(logging.WARNING):
        for dtype in (torch.float32, torch.float32, torch.bfloat16):
            x = torch.randn(5, dtype=dtype)
            assert torch.equal(run(x.clone(), 3), x * 3)
    assert len(caplog.records) == (1 if warning else 0)
    assert not warning or warning in caplog.text
    # One check a dtype, and a call for each result, while it is trusted.
    assert len(calls) == (1 if warning else 5)


def test_a_kernel_is_checked_in_every_variant(monkeypatch, caplog):
    """The first call of all may leave out what goes wrong."""
    fake = SimpleNamespace(shift=lambda x, bias, twice: x if bias is None else x + 2 * bias)
    monkeypatch.setattr(checked_kernels, "on_gpu", lambda x: True)
    monkeypatch.setitem(sys.modules, "astrolabe_diffusers.models.fake_kernels", fake)

    def shift(x, bias, twice):
        return x if bias is None else x + bias * (1 + twice)

    run, x = with_kernel("fake_kernels")(shift), torch.randn(4)
    assert torch.equal(run(x, None, False), x) and torch.equal(run(x, x, True), 3 * x)
    assert not caplog.records
    assert torch.equal(run(x, x, False), 2 * x) and torch.equal(run(x, x, True), 3 * x)
    assert len(caplog.records) == 1


def test_a_first_input_that_is_not_finite_says_nothing(monkeypatch, caplog):
    monkeypatch.setattr(checked_kernels, "on_gpu", lambda x: True)
    fake = SimpleNamespace(double=double)
    monkeypatch.setitem(sys.modules, "astrolabe_diffusers.models.fake_kernels", fake)
    with_kernel("fake_kernels")(double)(torch.tensor([1.0, float("nan"), float("inf")]), 3)
    assert not caplog.records
