"""Pictures in all the types that a video may start from."""

import math

import numpy as np
import PIL.Image
import pytest
import torch

from astrolabe_diffusers.models.vae_streaming import encode_video
from tests.pipelines.test_scenes import A
from tests.tiny_pipeline import tiny_pipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(num_layers=1, vae_num_res_blocks=0)


@pytest.fixture(scope="module")
def eight_bits():
    """`(9, 3, 32, 48)`"""
    return torch.randint(0, 256, (9, 3, 32, 48), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def started(pipe, **kwargs):
    """The first block, which the frames are given for, as latents."""
    return next(pipe.stream(A, num_frames=21, output_type="latent", **kwargs))


def test_eight_bits_are_fractions_of_255(pipe, eight_bits):
    expected = encode_video(pipe.vae, eight_bits.transpose(0, 1)[None] / 127.5 - 1)
    array = eight_bits.permute(0, 2, 3, 1).numpy()
    for video in (
        eight_bits,
        eight_bits[None],
        list(eight_bits),
        [eight_bits],
        eight_bits.float() / 255,
        array,
        [array],
        array[::-1][::-1],
        [PIL.Image.fromarray(image) for image in array],
    ):
        torch.testing.assert_close(started(pipe, video=video), expected, rtol=0, atol=1e-5)


def test_an_image_of_eight_bits(eight_bits):
    pipe, image = tiny_pipeline(num_frames_per_block=1), eight_bits[:1]
    expected = encode_video(pipe.vae, image[:, :, None] / 127.5 - 1)
    array = image[0].permute(1, 2, 0).numpy()
    for given in (image, image[0], array, PIL.Image.fromarray(array)):
        torch.testing.assert_close(started(pipe, image=given), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_images_that_are_not_rgb(mode, eight_bits):
    pipe, image = tiny_pipeline(num_frames_per_block=1), PIL.Image.fromarray(eight_bits[0].permute(1, 2, 0).numpy())
    converted = image.convert(mode)
    assert torch.equal(started(pipe, image=converted), started(pipe, image=converted.convert("RGB")))


def test_another_size_is_resized(pipe):
    """As in every pipeline of diffusers that starts from pictures."""
    assert started(pipe, video=torch.rand(9, 3, 40, 50)).shape == (1, 4, 3, 4, 6)


@pytest.mark.parametrize(
    "video,message",
    [
        (torch.full((9, 3, 32, 48), 127.0), r"floats in \[0, 1\] or uint8, but goes from 127 to 127"),
        (torch.linspace(-1, 1, 9 * 3 * 32 * 48).view(9, 3, 32, 48), "but goes from -1 to 1"),
        (torch.full((9, 3, 32, 48), math.nan), "but goes from nan to nan"),
        (np.full((9, 32, 48, 3), math.inf), "but goes from inf to inf"),
        (torch.ones(9, 3, 32, 48, dtype=torch.int64), "but is torch.int64"),
        (torch.rand(9, 32, 48, 3), "has 32 channels, not 3"),
        (torch.rand(9, 4, 32, 48), "has 4 channels, not 3"),
        (torch.rand(32, 48), r"3 to 5 dimensions but has the shape \(32, 48\)"),
        ([], "not empty, but is <class 'list'>"),
        (torch.rand(0, 3, 32, 48), "not empty"),
        ("video.mp4", "has to be images, arrays or tensors"),
        (torch.rand(1, 4, 3, 5, 6), r"must be finite and 4 x 6 for 32 x 48 pixels, .* \(1, 4, 3, 5, 6\)"),
        (torch.full((1, 4, 3, 4, 6), math.nan), "must be finite"),
    ],
)
def test_what_a_user_gets_wrong(pipe, video, message):
    for call in (pipe, pipe.stream):
        with pytest.raises(ValueError, match=f"`video`.*{message}") as error:
            call(A, video=video, num_frames=21)
        assert "\n" not in str(error.value)
