"""Groups that part from one past, and the decoding of their windows."""

import pytest
import torch

from astrolabe_diffusers.models.vae_streaming import decode_latents
from astrolabe_diffusers.rollout.past import Past
from astrolabe_diffusers.rollout.prompts import Prompt
from astrolabe_diffusers.rollout.samples import Sample
from astrolabe_diffusers.rollout.sampling import PromptEncoder, SharedPastSampler
from astrolabe_diffusers.rollout.scoring import decode_videos
from astrolabe_diffusers.rollout.seeds import seeded_generator
from tests.tiny_pipeline import tiny_pipeline, tiny_vae


PROMPT = Prompt("a red circle moves left on a black background")
SIZE = {"height": 16, "width": 32, "num_frames": 57}  # 15 latent frames, two tokens each
RELATIVE = {"sigmas": [1.0, 0.5], "local_attn_size": 9, "sink_size": 3, "rope_mode": "relative"}
MODELS = {
    "unlimited": {"sigmas": [1.0, 0.5]},
    "window": {"sigmas": [1.0, 0.5], "local_attn_size": 9, "sink_size": 3},
    "relative": RELATIVE,
    "gap": {**RELATIVE, "rope_window": 11},
    "EMA sink": {**RELATIVE, "sink_ema": 0.7},
    "fewer steps after the first block": {"sigmas": [1.0, 0.5], "first_block_sigmas": [1.0, 0.75, 0.5, 0.25]},
}


def samples(group, number=3):
    return [Sample(PROMPT, group, (7, 0, group, k)) for k in range(number)]


@pytest.mark.parametrize("model", MODELS)
def test_as_independent_rollouts_from_the_same_past(model):
    """The pipeline itself continues the past for every sample, with a cache of its own."""
    pipe = tiny_pipeline(**MODELS[model], vae_num_res_blocks=0)
    # What follows the past is no beginning.
    alone = tiny_pipeline(**{**MODELS[model], "first_block_sigmas": None}, vae_num_res_blocks=0)
    sampler = SharedPastSampler(pipe, SIZE, num_past_frames=9)
    encode = PromptEncoder(pipe)
    for group in (0, 1):
        batch = samples(group)
        embeds = encode([PROMPT.text] * 3)
        latents, _ = sampler(embeds, batch)
        assert latents.shape == (3, 4, 15, 2, 4)
        past = latents[:1, :, :9]
        assert all(torch.equal(past, latents[i : i + 1, :, :9]) for i in range(3))
        for i, sample in enumerate(batch):
            generator = seeded_generator("sample", *sample.key)
            arguments = {"prompt_embeds": embeds[:1], "video": past, "generator": [generator], **SIZE}
            expected = alone(**arguments, output_type="latent").frames
            assert (latents[i : i + 1] - expected).abs().max() < 1e-5
        assert (latents[0] - latents[1])[:, 9:].abs().max() > 0.1


def test_the_past_belongs_to_the_group():
    """Batches of one group, on any process, have the same past; it is a video of the pipeline."""
    pipe = tiny_pipeline(vae_num_res_blocks=0, sigmas=[1.0, 0.5])
    embeds = PromptEncoder(pipe)([PROMPT.text] * 2)
    first, other = (SharedPastSampler(pipe, SIZE, num_past_frames=9) for _ in range(2))
    whole, _ = first(embeds[:1].expand(4, -1, -1), samples(0, 4))
    halves = [other(embeds, samples(0, 4)[part])[0] for part in (slice(2), slice(2, 4))]
    assert (whole - torch.cat(halves)).abs().max() < 1e-5
    assert (whole - first(embeds, samples(1, 2))[0][:1])[:, :, :9].abs().max() > 0.1
    expected = pipe(
        prompt_embeds=embeds[:1], generator=[seeded_generator("past", 7, 0, 0)], output_type="latent", **SIZE
    ).frames
    assert expected.shape == whole[:1].shape
    assert (whole[:1, :, :9] - expected[:, :, :9]).abs().max() < 1e-5


def test_the_decoder_is_warm():
    """A window's frames are those of the whole video, bit for bit but rounding, however far back it begins."""
    vae = tiny_vae()
    latents = torch.randn(3, 4, 48, 4, 4, generator=torch.Generator().manual_seed(0))
    latents[2, :, :42] = latents[0, :, :42]
    with torch.no_grad():
        whole = (decode_latents(vae, latents).float() / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    window = decode_videos(vae, latents, Past(42))
    assert window.shape == (3, 24, 3, 32, 32)
    assert (window - whole[:, -24:]).abs().max() < 1e-4
    cold = decode_videos(vae, latents[:, :, 42:])
    assert (cold[:, -20:] - whole[:, -20:]).abs().max() > 1e-3

    expected = window[[0, 2]]
    shared = decode_videos(vae, latents[[0, 2]], Past(42, shared=True))
    # Another batch size rounds otherwise, and the norms of random weights make it more.
    assert (shared - expected).abs().max() < 1e-3 and (shared - expected).abs().mean() < 1e-6
