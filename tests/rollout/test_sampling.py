import math
import threading

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
    return policy_pipeline()


def collect(pipe, samples, batch_size, worker=None):
    worker = worker or reward_worker(pipe)
    batches = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
    generated = list(Rollout(pipe, worker).generate(batches, SIZE))
    scores, _ = gather_scores(generated, samples)
    worker.shutdown()
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
    policy_parameters(pipe.transformer, "default")[0].data[0, 0] = math.nan
    worker = reward_worker(pipe)
    with use_policy(pipe.transformer, "current"), pytest.raises(UserError, match="sampling: the latents of a block"):
        past = Past(3, shared=True) if shared_past else Past()
        list(Rollout(pipe, worker).generate([samples], SIZE, past))
    worker.shutdown()


def test_scores_come_in_the_order_asked_for(pipe):
    samples = make_samples(4)
    worker = reward_worker(pipe)
    with use_policy(pipe.transformer, "old"):
        generated = list(Rollout(pipe, worker).generate([samples[:2], samples[2:]], SIZE))
    scores, seconds = gather_scores(generated, samples[::-1])
    videos = decode_videos(pipe.vae, torch.cat([batch.latents for batch in generated]))
    expected = videos.mean(dim=(1, 2, 3, 4)).flip(0)
    torch.testing.assert_close(scores["reward"], expected)
    torch.testing.assert_close(scores["tests.training.rewards:brightness"], expected)
    colors = [scores[f"tests.training.rewards:brightness/{color}"] for color in ("red", "green", "blue")]
    torch.testing.assert_close(torch.stack(colors).mean(0), expected)
    assert seconds > 0


def test_scoring_runs_beside_sampling(pipe):
    """The reward of the first batch waits until the second batch is being sampled: without a thread, for ever."""
    sampling_second = threading.Event()
    worker = reward_worker(pipe)
    inner = worker.rewards

    def wait_and_score(*args):
        assert sampling_second.wait(timeout=20)
        return inner(*args)

    worker.rewards = wait_and_score
    samples = make_samples(2)

    def batches():
        yield samples[:1]
        sampling_second.set()
        yield samples[1:]

    with use_policy(pipe.transformer, "old"):
        generated = list(Rollout(pipe, worker).generate(batches(), SIZE))
    assert len(gather_scores(generated, samples)[0]["reward"]) == 2


def test_videos_do_not_pile_up_behind_a_slow_reward(pipe):
    worker = reward_worker(pipe)
    inner, waiting = worker.rewards, []

    def count(*args):
        waiting.append(worker._thread._calls.qsize())
        return inner(*args)

    worker.rewards = count
    samples = make_samples(4)
    with use_policy(pipe.transformer, "old"):
        generated = list(Rollout(pipe, worker).generate([[s] for s in samples], SIZE))
    gather_scores(generated, samples)
    assert len(waiting) == 4 and max(waiting) <= 1


def test_broken_reward_is_one_line(pipe):
    with use_policy(pipe.transformer, "old"), pytest.raises(UserError) as error:
        collect(pipe, make_samples(1), 1, reward_worker(pipe, "tests.training.rewards:broken"))
    message = str(error.value)
    assert "\n" not in message
    for word in ("a red circle", "ZeroDivisionError: a reward that cannot work", "rewards.py:"):
        assert word in message


def test_broken_reward_ends_sampling(pipe):
    samples = make_samples(4)
    worker = reward_worker(pipe, "tests.training.rewards:broken")
    generated = Rollout(pipe, worker).generate([[sample] for sample in samples], SIZE)
    batch = next(generated)
    with pytest.raises(UserError, match="ZeroDivisionError"):
        next(generated)  # the second was sampled while the first was scored
    with pytest.raises(UserError, match="ZeroDivisionError"):
        gather_scores([batch], samples[:1])
    worker.shutdown()


def test_reward_that_hangs_ends_sampling(pipe):
    worker = reward_worker(pipe, "tests.training.rewards:hangs", timeout=0.2)
    with pytest.raises(UserError, match="has not answered for 0.2 s; raise reward_timeout"):
        list(Rollout(pipe, worker).generate([[sample] for sample in make_samples(2)], SIZE))


def test_nan_reward_stops(pipe):
    with use_policy(pipe.transformer, "old"), pytest.raises(UserError, match="nan.*a red circle") as error:
        collect(pipe, make_samples(1), 1, reward_worker(pipe, "tests.training.rewards:always_nan"))
    assert "\n" not in str(error.value)


def test_nan_reward_is_skipped_on_request(pipe):
    contrast = "tests.training.rewards:contrast"
    worker = reward_worker(pipe, "tests.training.rewards:nan_for_bright", watched=contrast, skip_bad=True)
    videos = torch.rand(3, 2, 3, 4, 4)
    videos[:, 0, 0, 0, 0] = torch.tensor([0.1, 0.9, 0.2])
    scores = worker.score(videos, make_samples(3), watched=True)
    assert scores["reward"].isnan().tolist() == [False, True, False]
    torch.testing.assert_close(scores["reward"][[0, 2]], videos.flatten(1).mean(1)[[0, 2]])
    torch.testing.assert_close(scores[contrast], videos.flatten(1).std(1))
    worker.shutdown()


def test_watched_rewards_do_not_count(pipe):
    worker = reward_worker(pipe, watched="tests.training.rewards:contrast")
    videos = torch.rand(2, 2, 3, 4, 4)
    trained = worker.score(videos, make_samples(2))
    both = worker.score(videos, make_samples(2), watched=True)
    assert "tests.training.rewards:contrast" not in trained
    torch.testing.assert_close(both["reward"], trained["reward"])
    assert "tests.training.rewards:contrast" in both
    worker.shutdown()


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
