"""Against Pillow itself, and torchvision where there is one."""

import numpy as np
import pytest
import torch
from PIL import Image

from astrolabe_diffusers.rewards.frames import FrameRequest, prepare_frames, to_uint8
from astrolabe_diffusers.rewards.models.model_reward import as_pillow


SIZES = [((480, 832), (336, 588)), ((60, 100), (364, 616)), ((90, 160), (90, 84)), ((64, 64), (64, 64))]


def pictures(size):
    """Smooth shapes, hard edges and noise."""
    y, x = torch.meshgrid(torch.linspace(0, 1, size[0]), torch.linspace(0, 1, size[1]), indexing="ij")
    smooth = torch.stack([torch.sin(20 * x) / 2 + 0.5, y * x, torch.cos(30 * y * x) / 2 + 0.5])
    edges = ((x * 13).floor() + (y * 7).floor()).remainder(2).expand(3, -1, -1)
    return to_uint8(torch.stack([smooth, edges, torch.rand(3, *size)]))


def resized(frames, *sizes):
    return prepare_frames(frames[None], FrameRequest(tuple(range(len(frames))), sizes))[0]


@pytest.mark.parametrize("before, after", SIZES)
def test_pillow(before, after):
    frames = pictures(before)
    expected = [
        np.array(Image.fromarray(frame.permute(1, 2, 0).numpy()).resize(after[::-1], Image.Resampling.BICUBIC))
        for frame in frames
    ]
    found = resized(frames, *as_pillow(after, before[0])).permute(0, 2, 3, 1)
    difference = (found.int() - torch.tensor(np.stack(expected)).int()).abs()
    # Pillow rounds a tie up, and has its weights in 22 bits: the hard edges have many ties, in both passes.
    assert difference.max() <= 2 and (difference == 2).float().mean() < 1e-4
    assert (difference > 0).float().mean((1, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=0.015)


@pytest.mark.parametrize("before, after", SIZES)
def test_torchvision(before, after):
    functional = pytest.importorskip(
        "torchvision.transforms.functional",
        reason="needs a torchvision that fits torch",
        exc_type=(ImportError, RuntimeError),
    )
    from torchvision.transforms import InterpolationMode

    frames = pictures(before)
    expected = functional.resize(frames, after, InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(resized(frames, after), expected)
