import numpy as np
import torch
from PIL import Image

from astrolabe_diffusers.rewards import FrameRequest, prepare_frames


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
