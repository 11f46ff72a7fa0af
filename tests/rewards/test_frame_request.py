import numpy as np
import torch
from PIL import Image

from astrolabe_diffusers.rewards import FrameRequest, prepare_frames
from tests.rewards.slow_resize import resize


def test_frames_and_rounding():
    videos = torch.rand(2, 5, 3, 6, 8)
    frames = prepare_frames(videos, FrameRequest((4, 0)))
    expected = np.round(videos[:, [4, 0]].double().numpy() * 255)
    assert frames.dtype == torch.uint8 and np.array_equal(frames.numpy(), expected)


def test_what_was_prepared_stays_as_it_is():
    frames = torch.randint(0, 256, (2, 3, 3, 6, 8), dtype=torch.uint8)
    request = FrameRequest((0, 1, 2), ((6, 8),))
    assert torch.equal(prepare_frames(frames.float() / 255, request), frames)
    assert torch.equal(prepare_frames(frames, request), frames)


def test_two_sizes_are_what_pillow_does():
    frames = torch.randint(0, 256, (1, 2, 3, 40, 60), dtype=torch.uint8)
    small = prepare_frames(frames, FrameRequest((0, 1), ((40, 17), (23, 17))))[0]
    for frame, expected in zip(small, frames[0]):
        image = Image.fromarray(expected.permute(1, 2, 0).numpy()).resize((17, 23), Image.Resampling.BICUBIC)
        difference = np.abs(frame.permute(1, 2, 0).numpy().astype(int) - np.asarray(image))
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_colour_goes_before_the_size_changes():
    """As published: 256 steps, gray rounded down, then one resize that is rounded to the nearest."""
    videos = torch.rand(2, 3, 3, 60, 100, generator=torch.Generator().manual_seed(0))
    colours = np.round(videos[:, [0, 2]].double().numpy() * 255)
    gray = np.floor(np.tensordot(colours, [0.2989, 0.587, 0.114], axes=([2], [0])))[:, :, None]
    expected = np.clip(np.round(resize(gray, 28, 56)), 0, 255)
    frames = prepare_frames(videos, FrameRequest((0, 2), ((28, 56),), gray=True)).numpy()
    assert frames.shape == (2, 2, 1, 28, 56) and frames.dtype == np.uint8
    assert np.array_equal(frames, expected)
    small = np.clip(np.round(resize(colours, 28, 56)), 0, 255)
    other_order = np.floor(np.tensordot(small, [0.2989, 0.587, 0.114], axes=([2], [0])))[:, :, None]
    assert (frames != other_order).mean() > 0.1
