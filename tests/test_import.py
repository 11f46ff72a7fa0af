"""What `import astrolabe_diffusers` does to the process."""

import importlib

import diffusers
import pytest

import astrolabe_diffusers


def test_registers_with_diffusers():
    assert diffusers.CausalWanPipeline is astrolabe_diffusers.CausalWanPipeline
    assert diffusers.CausalWanTransformer3DModel is astrolabe_diffusers.CausalWanTransformer3DModel


def test_exports():
    for name in astrolabe_diffusers.__all__:
        assert getattr(astrolabe_diffusers, name) is not None
    assert isinstance(astrolabe_diffusers.TINY_SHAPES, str)


def test_refuses_to_replace_a_class_of_diffusers(monkeypatch):
    monkeypatch.setattr(diffusers, "CausalWanPipeline", type("CausalWanPipeline", (), {}))
    with pytest.raises(ImportError, match="CausalWanPipeline"):
        importlib.reload(astrolabe_diffusers)
