"""MUSIQ, where pyiqa is installed, against pyiqa's own metric."""

import sys

import pytest
import torch

from astrolabe_diffusers.rewards.models.musiq import Musiq
from tests.rewards.drawn_patterns import patterns


def test_without_pyiqa_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with pytest.raises(ImportError, match="musiq needs pyiqa: pip install pyiqa"):
        Musiq("nowhere")


@pytest.fixture(scope="module")
def pyiqa():
    return pytest.importorskip("pyiqa", reason="needs pyiqa: pip install pyiqa", exc_type=(ImportError, RuntimeError))


@pytest.fixture(scope="module")
def folder(pyiqa, tmp_path_factory):
    """With the published file, of random numbers."""
    from pyiqa.archs.musiq_arch import MUSIQ

    model = MUSIQ(pretrained=False)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    folder = tmp_path_factory.mktemp("musiq")
    torch.save(model.state_dict(), folder / "musiq_spaq_ckpt-358bb6af.pth")
    return folder


def test_against_pyiqa(pyiqa, folder):
    file = str(folder / "musiq_spaq_ckpt-358bb6af.pth")
    metric = pyiqa.create_metric("musiq-spaq", pretrained_model_path=file, device="cpu")
    videos = patterns(frames=3)
    with torch.no_grad():
        expected = metric((videos.flatten(0, 1) * 255).round() / 255).view(2, 3).mean(1) / 100
    output = Musiq(str(folder), device="cpu", batch_size=4).score(videos, ["", ""])
    torch.testing.assert_close(output.scores, expected, atol=1e-6, rtol=1e-5)
    assert (expected[0] - expected[1]).abs() > 1e-4
    torch.testing.assert_close(output.info["mean"], output.scores)


def test_what_is_missing_or_does_not_fit(folder, tmp_path):
    with pytest.raises(ValueError, match="needs a checkpoint, pyiqa's file musiq_spaq_ckpt-358bb6af.pth"):
        Musiq()
    weights = torch.load(folder / "musiq_spaq_ckpt-358bb6af.pth")
    # AVA's has ten grades.
    weights["head.0.weight"], weights["head.0.bias"] = torch.zeros(10, 384), torch.zeros(10)
    del weights["head.weight"], weights["head.bias"]
    torch.save(weights, tmp_path / "ava.pth")
    with pytest.raises(ValueError, match=r"no MUSIQ with one score, as pyiqa has it: 2 missing \(head.weight"):
        Musiq(str(tmp_path / "ava.pth"))
