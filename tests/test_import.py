"""What `import astrolabe_diffusers` does to the process.

That diffusers finds our classes, whichever of the two is imported first, is seen in the fresh processes of
tests/test_platforms.py and tests/pipelines/test_loading.py.
"""

import importlib
import subprocess
import sys

import diffusers
import pytest

import astrolabe_diffusers


def python(code: str) -> str:
    """What a new Python prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_registers_with_diffusers():
    assert diffusers.CausalWanPipeline is astrolabe_diffusers.CausalWanPipeline
    assert diffusers.CausalWanTransformer3DModel is astrolabe_diffusers.CausalWanTransformer3DModel


def test_importing_loads_nothing_large():
    code = "import sys, astrolabe_diffusers, astrolabe_diffusers.training, astrolabe_diffusers.rewards\n"
    code += "print(*{'torch', 'numpy', 'diffusers', 'transformers', 'accelerate'} & sys.modules.keys())\n"
    code += "print(astrolabe_diffusers.NFTConfig().rank, 'torch' in sys.modules)"
    assert python(code) == "\n256 False\n"


def test_exports():
    for name in astrolabe_diffusers.__all__:
        assert getattr(astrolabe_diffusers, name) is not None
        assert name in dir(astrolabe_diffusers)
    assert isinstance(astrolabe_diffusers.TINY_SHAPES, str)
    for module in ("rewards", "training"):
        package = importlib.import_module(f"astrolabe_diffusers.{module}")
        assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match="'astrolabe_diffusers' has no attribute 'Nothing'"):
        astrolabe_diffusers.Nothing


def test_refuses_to_replace_a_class_of_diffusers(monkeypatch):
    monkeypatch.setattr(diffusers, "CausalWanPipeline", type("CausalWanPipeline", (), {}))
    with pytest.raises(ImportError, match="CausalWanPipeline"):
        importlib.reload(astrolabe_diffusers)
