"""Krea's server: every block sees a context that is encoded anew, in place of a cache that grows."""

import pytest
import torch
from diffusers import DiffusionPipeline

from astrolabe_diffusers.models.vae_streaming import decode_latents, encode_video
from tests.tiny_pipeline import tiny_pipeline


PROMPT = "a red circle moves up on a white background"
FIVE_STEPS = [1.0, 0.75, 0.5, 0.25, 0.0]


@torch.no_grad()
def server(pipe, num_blocks, seed=0):
    """baselines.md 2 and 3 in plain loops, without a cache, the whole video decoded again for every block."""
    generator, text, n = torch.Generator().manual_seed(seed), pipe.encode_prompt(PROMPT), 3
    noise = torch.randn(1, 4, n * num_blocks, 4, 6, generator=generator)
    raw = torch.tensor([s if s else 0.001 for s in FIVE_STEPS], dtype=torch.float64)
    sigmas = 5 * raw / (1 + 4 * raw)
    timesteps = [1000.0, 937.5, 2500 / 3, 625.0, 0.0]
    assert sigmas[-1].item() == pytest.approx(0.00498, abs=1e-6)
    video = noise[:, :, :0]
    for b in range(num_blocks):
        x = noise[:, :, n * b : n * b + n]
        if b == 0:
            context = video
        elif b == 1:
            context = torch.cat([video[:, :, :1], video[:, :, 1:][:, :, -2:]], dim=2)
        else:
            frames = decode_latents(pipe.vae, video)
            context = torch.cat([encode_video(pipe.vae, frames[:, :, -9:][:, :, :1]), video[:, :, -2:]], dim=2)
        for i, t in enumerate(timesteps):
            noisy = torch.cat([context, x], dim=2)
            clean = torch.cat([context, torch.zeros_like(x)], dim=2)
            flow = pipe.transformer(noisy, torch.full((1, noisy.shape[2]), t), text, clean_hidden_states=clean).sample
            x = (x.double() - sigmas[i] * flow[:, :, -n:].double()).float()
            if i + 1 < len(timesteps):
                fresh = torch.randn(x.shape, generator=generator)
                x = ((1 - sigmas[i + 1]) * x + sigmas[i + 1] * fresh).float()
        video = torch.cat([video, x], dim=2)
    return video


def generate(pipe, output_type="latent", num_frames=45, **kwargs):
    generator = torch.Generator().manual_seed(0)
    return pipe(PROMPT, num_frames=num_frames, generator=generator, output_type=output_type, **kwargs).frames


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(num_context_frames=3, sigmas=FIVE_STEPS)


def test_equals_the_plain_loop(pipe):
    assert (generate(pipe) - server(pipe, 4)).abs().max() < 1e-4


def test_is_not_the_cache_that_grows(pipe):
    plain = tiny_pipeline(sigmas=FIVE_STEPS)
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
    pipe = tiny_pipeline(num_context_frames=3, rope_max_seq_len=8)
    assert generate(pipe, num_frames=57).shape[2] == 15
    with pytest.raises(ValueError, match="8 absolute positions"):
        generate(tiny_pipeline(rope_max_seq_len=8), num_frames=57)


def test_saved_and_switched_off_at_loading(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert loaded.config.num_context_frames == 3 and loaded.config.sigmas == FIVE_STEPS
    plain = DiffusionPipeline.from_pretrained(tmp_path, num_context_frames=None, sigmas=[1.0, 0.5])
    assert plain.config.num_context_frames is None and plain.config.sigmas == [1.0, 0.5]
