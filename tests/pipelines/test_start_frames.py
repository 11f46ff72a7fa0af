"""Videos that begin with given frames."""

import numpy as np
import pytest
import torch
from PIL import Image

from astrolabe_diffusers.models.vae_streaming import encode_video
from tests.reference_causal_wan import published_noise
from tests.tiny_pipeline import SMALL, tiny_pipeline


TWO_STEPS = {**SMALL, "sigmas": [1.0, 0.5]}
PROMPTS = ["a red circle moves up on a white background", "a blue cross moves left on a gray background"]


def frames(count, seed=0, size=(16, 32)):
    return np.random.default_rng(seed).random((count, *size, 3)).astype("float32")


def generate(pipe, prompt=PROMPTS[0], seed=0, output_type="latent", **kwargs):
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, generator=generator, output_type=output_type, **kwargs).frames


@torch.no_grad()
def continued(pipe, given, num_frames, seed=0):
    """Without a cache: at every step the whole sequence, each block given the clean ones before it."""
    n, text = pipe.transformer.config.num_frames_per_block, pipe.encode_prompt(PROMPTS[0])
    shape = list(given.shape)
    shape[2] = num_frames - given.shape[2]
    noise, renoise = published_noise(torch.Generator().manual_seed(seed), shape, n, [2] * (shape[2] // n))
    video, sigmas = given, [5 * s / (1 + 4 * s) for s in pipe.config.sigmas]
    for block, draws in zip(noise.split(n, dim=2), renoise):
        for i, sigma in enumerate(sigmas):
            clean, noisy = torch.cat([video, torch.zeros_like(block)], 2), torch.cat([video, block], 2)
            timestep = torch.full((1, noisy.shape[2]), 1000 * sigma)
            flow = pipe.transformer(noisy, timestep, text, clean_hidden_states=clean).sample[:, :, -n:]
            block = block - sigma * flow
            if i + 1 < len(sigmas):
                block = (1 - sigmas[i + 1]) * block + sigmas[i + 1] * draws[i]
        video = torch.cat([video, block], dim=2)
    return video


@pytest.mark.parametrize("num_given", [9, 33])
@pytest.mark.parametrize("config", [{}, {"sink_size": 3, "local_attn_size": 6}])
@torch.no_grad()
def test_a_video_goes_on(config, num_given):
    pipe, video = tiny_pipeline(**TWO_STEPS, **config), frames(num_given)
    given = encode_video(pipe.vae, torch.from_numpy(video).permute(3, 0, 1, 2)[None] * 2 - 1)
    first, total = given.shape[2], given.shape[2] + 9
    num_frames = num_given + 36
    result = generate(pipe, video=video, num_frames=num_frames)
    assert result.shape[2] == total and torch.equal(result[:, :, :first], given)
    assert (result - continued(pipe, given, total)).abs().max() < 1e-4
    # What was given matters to what follows.
    other = generate(pipe, video=given + 1, num_frames=num_frames)
    assert (result - other)[:, :, first:].abs().max() > 0.01


def test_an_image_starts_a_video():
    pipe, image = tiny_pipeline(**TWO_STEPS, num_frames_per_block=1), frames(1)
    given = encode_video(pipe.vae, torch.from_numpy(image).permute(3, 0, 1, 2)[None] * 2 - 1)
    expected = continued(pipe, given, 4)
    assert (generate(pipe, image=image, num_frames=13) - expected).abs().max() < 1e-4
    # A PIL image of another size is resized; eight bits are as good as the autoencoder needs.
    picture = Image.fromarray((image[0] * 255).round().astype("uint8"))
    assert (generate(pipe, image=picture, num_frames=13) - expected).abs().mean() < 0.05
    assert generate(pipe, image=picture.resize((100, 80)), num_frames=13).shape == expected.shape


def test_one_start_a_prompt_or_one_for_all():
    pipe, videos = tiny_pipeline(**TWO_STEPS), [frames(9, seed) for seed in (0, 1)]
    latents = torch.randn(2, 4, 3, 2, 4, generator=torch.Generator().manual_seed(7))

    def run(prompts, videos, latents):
        generators = [torch.Generator().manual_seed(9) for _ in latents]
        arguments = dict(video=videos, latents=latents, generator=generators, output_type="latent", num_frames=21)
        return pipe(prompts, **arguments).frames

    both = run(PROMPTS, videos, latents)
    for i in range(2):
        assert (run(PROMPTS[i], videos[i], latents[i : i + 1]) - both[i : i + 1]).abs().max() < 1e-5
    shared = run(PROMPTS, videos[0], latents)
    assert torch.equal(shared[0, :, :3], shared[1, :, :3]) and not torch.equal(shared[0], shared[1])
    assert (shared[0] - both[0]).abs().max() < 1e-5


def test_streamed_pieces_are_the_whole_video():
    pipe, video = tiny_pipeline(**TWO_STEPS), frames(9)
    arguments = dict(video=video, num_frames=33, output_type="pt")
    pieces = list(pipe.stream(PROMPTS[0], generator=torch.Generator().manual_seed(0), **arguments))
    assert [piece.shape[1] for piece in pieces] == [9, 12, 12]
    assert torch.equal(torch.cat(pieces, dim=1), generate(pipe, **arguments))


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"image": frames(1)}, "this model makes blocks of 3: pass a `video` of 9 frames"),
        ({"video": frames(8)}, "`video` has 8 frames, which is no whole number of blocks: 9, 21, 33"),
        ({"video": frames(5)}, "`video` has 5 frames"),
        ({"video": frames(21)}, "`num_frames=21` leaves nothing to generate after the 21 given frames"),
        ({"video": frames(9), "image": frames(1)}, "either `image` or `video`"),
        ({"video": [frames(9)] * 3, "prompt": PROMPTS}, "3 images or videos to start from: pass one, or one a prompt"),
        ({"video": frames(9), "latents": torch.zeros(1, 4, 6, 2, 4)}, r"must have the shape \(1, 4, 3, 2, 4\)"),
    ],
)
def test_what_a_user_gets_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_pipeline(**TWO_STEPS), **arguments)
