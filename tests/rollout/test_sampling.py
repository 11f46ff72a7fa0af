import math

import pytest
import torch

from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.rollout.past import Past
from astrolabe_diffusers.rollout.sampling import PromptEncoder, Rollout, Sampler
from astrolabe_diffusers.rollout.scoring import decode_videos, gather_scores
from astrolabe_diffusers.rollout.seeds import seeded_generator
from astrolabe_diffusers.training.policies import policy_parameters, use_policy
from tests.training.helpers import SIZE, make_samples, policy_pipeline, reward_worker


@pytest.fixture(scope="module")
def pipe():
    return policy_pipeline(num_layers=1, vae_num_res_blocks=0)


def collect(pipe, samples, batch_size, worker=None):
    worker = worker or reward_worker(pipe)
    batches = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
    generated = list(Rollout(pipe, worker).generate(batches, SIZE))
    scores, _ = gather_scores(generated, samples)
    worker.close()
    return generated, scores


def test_samples_do_not_depend_on_the_batches(pipe):
    samples = make_samples(4)
    with use_policy(pipe.transformer, "old"):
        whole, scores = collect(pipe, samples, 4)
        parts, part_scores = collect(pipe, samples, 1)
    latents = torch.cat([batch.latents for batch in parts])
    torch.testing.assert_close(whole[0].latents, latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores, part_scores, rtol=0, atol=1e-5)
    distances = (latents[:, None] - latents[None]).abs().flatten(2).amax(2)
    assert distances[~torch.eye(4, dtype=bool)].min() > 0.1  # no two samples are the same


def test_videos_are_the_pipelines_own(pipe):
    samples = make_samples(2)
    with use_policy(pipe.transformer, "old"):
        embeds = PromptEncoder(pipe)(sample.prompt.text for sample in samples)
        latents, _ = Sampler(pipe, SIZE)(embeds, samples)
        videos = decode_videos(pipe.vae, latents)
        generators = [seeded_generator("sample", *sample.key) for sample in samples]
        expected = pipe([s.prompt.text for s in samples], generator=generators, output_type="pt", **SIZE).frames
    assert latents.shape == (2, 4, 6, 4, 4) and videos.shape == (2, 21, 3, 32, 32)
    torch.testing.assert_close(videos, expected, rtol=0, atol=1e-5)


def test_sampling_uses_the_policy_that_is_active(pipe):
    samples = make_samples(1)
    latents = {}
    for policy in ("current", "old", "reference"):
        with use_policy(pipe.transformer, policy):
            latents[policy] = collect(pipe, samples, 1)[0][0].latents
    assert (latents["current"] - latents["old"]).abs().max() > 1e-3
    assert (latents["old"] - latents["reference"]).abs().max() > 1e-3


@pytest.mark.parametrize("shared_past", [False, True])
def test_a_policy_that_is_not_finite(shared_past):
    pipe, samples = policy_pipeline(), make_samples(2)
    # The last one: attention to keys that are all NaN is 0 on some processors.
    policy_parameters(pipe.transformer, "default")[-1].data[0, 0] = math.nan
    worker = reward_worker(pipe)
    with use_policy(pipe.transformer, "current"), pytest.raises(UserError, match="sampling: the latents of a block"):
        past = Past(3, shared=True) if shared_past else Past()
        list(Rollout(pipe, worker).generate([samples], SIZE, past))
    worker.close()


def test_prompts_are_encoded_once_and_forgotten_in_order(pipe, monkeypatch):
    calls = []
    encode = pipe.encode_prompt
    monkeypatch.setattr(pipe, "encode_prompt", lambda prompt: calls.append(prompt[0]) or encode(prompt), raising=False)
    encoder = PromptEncoder(pipe, max_prompts=2)
    embeds = encoder(["a red circle", "a blue square", "a red circle"])
    assert calls == ["a red circle", "a blue square"]
    torch.testing.assert_close(embeds, encode(["a red circle", "a blue square", "a red circle"]))
    encoder(["a green cross"])  # the square was used least recently
    encoder(["a red circle"])
    assert calls[2:] == ["a green cross"]
    encoder(["a blue square"])
    assert calls[3:] == ["a blue square"]
    assert not embeds.requires_grad and not math.isnan(embeds.sum())
