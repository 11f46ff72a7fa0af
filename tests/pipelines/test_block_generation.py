"""Krea's server: every block sees a context that is encoded anew, in place of a cache that grows."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from astrolabe_diffusers.models.vae_streaming import decode_latents, encode_video
from tests.reference_causal_wan import ReferenceCausalWan, published_noise
from tests.tiny_pipeline import SMALL, tiny_pipeline


PROMPT = "a red circle moves up on a white background"
STEPS = [1.0, 0.5, 0.0]


def server_context(vae, num_frames=3, num_given=0):
    """What a block sees of the latents before it, by baselines.md 2: recomputed from all of them."""

    def context(video):
        block = (video.shape[2] - num_given) // 3
        last = video[:, :, 1:][:, :, -(num_frames - 1) :] if num_frames > 1 else video[:, :, :0]
        if block == 0 and num_given == num_frames:
            return video  # the start image
        if block == 1:
            return torch.cat([video[:, :, :1], last], dim=2)
        seen = decode_latents(vae, video.float())[:, :, -(1 + 4 * (num_frames - 1)) :]
        return torch.cat([encode_video(vae, seen[:, :, :1]).double(), last], dim=2)

    return context


@torch.no_grad()
def server(pipe, num_blocks, num_frames=3, given=None, seed=0):
    reference = ReferenceCausalWan(pipe.transformer.state_dict(), dict(pipe.transformer.config))
    sigmas, n = pipe.config.sigmas, 3
    shape = (1, 4, n * num_blocks, pipe.config.height // 8, pipe.config.width // 8)
    noise, renoise = published_noise(torch.Generator().manual_seed(seed), shape, n, [len(sigmas)] * num_blocks)
    text = pipe.encode_prompt(PROMPT)
    context = server_context(pipe.vae, num_frames, 0 if given is None else given.shape[2])
    return reference.sample(noise, renoise, text, sigmas, encode_context=context, given=given)


def generate(pipe, output_type="latent", num_frames=45, **kwargs):
    generator = torch.Generator().manual_seed(0)
    return pipe(PROMPT, num_frames=num_frames, generator=generator, output_type=output_type, **kwargs).frames


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(**SMALL, num_context_frames=3, sigmas=STEPS)


def test_equals_the_server(pipe):
    assert (generate(pipe) - server(pipe, 4)).abs().max() <= 1e-5


@pytest.fixture(scope="module")
def three_frames():
    return server(tiny_pipeline(**SMALL, sigmas=[1.0, 0.0]), 4, 3)


@pytest.mark.parametrize("num_frames", [1, 2, 4, 6, 8])
def test_other_numbers_of_frames(num_frames, three_frames):
    """Encoded in blocks of three that see those before them; the second block sees the very first latent frame."""
    pipe = tiny_pipeline(**SMALL, num_context_frames=num_frames, sigmas=[1.0, 0.0])
    wanted = server(pipe, 4, num_frames)
    assert (generate(pipe) - wanted).abs().max() <= 1e-5
    # Only the first block sees nothing of the others.
    assert (wanted - three_frames).abs().amax(dim=(0, 1, 3, 4))[-3:].min() > 1e-3


def test_a_start_image(pipe):
    """Repeated nine times it is three latent frames, of which the first is seen for two blocks."""
    image = np.random.default_rng(0).random((16, 32, 3)).astype("float32")
    video = np.stack([image] * 9)
    given = encode_video(pipe.vae, torch.from_numpy(video).permute(3, 0, 1, 2)[None] * 2 - 1)
    wanted = server(pipe, 3, given=given)
    assert (generate(pipe, video=video) - wanted).abs().max() <= 1e-5


def test_a_longer_given_video_goes_on_from_its_end(pipe):
    """Its first frame is long gone: what is seen is encoded anew, as of frames that were generated."""
    latents = torch.randn(1, 4, 9, 2, 4, generator=torch.Generator().manual_seed(1))
    other = latents.clone()
    other[:, :, :1] += 1.0
    results = [generate(pipe, video=video, num_frames=57)[:, :, 9:] for video in (latents, other)]
    assert (results[0] - results[1]).abs().max() < 1e-2


def test_is_not_the_cache_that_grows(pipe):
    plain = tiny_pipeline(**SMALL, sigmas=STEPS)
    difference = (generate(pipe) - generate(plain)).abs().amax(dim=(0, 1, 3, 4))
    # The first context is the first block itself; only from the third block on the frames before it are left out.
    assert difference[:6].max() < 1e-5 and difference[6:].min() > 1e-3


def test_frames_and_latents_are_of_one_video(pipe):
    frames = generate(pipe, "pt")
    expected = (decode_latents(pipe.vae, generate(pipe)).detach() / 2 + 0.5).transpose(1, 2)
    assert (frames - expected).abs().max() < 1e-5
    pieces = list(pipe.stream(PROMPT, num_frames=45, generator=torch.Generator().manual_seed(0), output_type="pt"))
    assert torch.equal(torch.cat(pieces, dim=1), frames)


def test_has_no_last_position():
    pipe = tiny_pipeline(**SMALL, num_context_frames=3, rope_max_seq_len=8)
    assert generate(pipe, num_frames=57).shape[2] == 15
    with pytest.raises(ValueError, match="8 absolute positions"):
        generate(tiny_pipeline(**SMALL, rope_max_seq_len=8), num_frames=57)


def test_saved_and_switched_off_at_loading(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert loaded.config.num_context_frames == 3 and loaded.config.sigmas == STEPS
    plain = DiffusionPipeline.from_pretrained(tmp_path, num_context_frames=None, sigmas=[1.0, 0.5])
    assert plain.config.num_context_frames is None and plain.config.sigmas == [1.0, 0.5]
