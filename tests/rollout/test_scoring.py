"""Decoding and scoring beside sampling."""

import threading

import pytest
import torch

from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.rollout.sampling import Rollout
from astrolabe_diffusers.rollout.scoring import decode_videos, gather_scores
from astrolabe_diffusers.training.policies import use_policy
from tests.training.helpers import SIZE, make_samples, policy_pipeline, reward_worker


@pytest.fixture(scope="module")
def pipe():
    return policy_pipeline(num_layers=1, vae_num_res_blocks=0)


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
    with reward_worker(pipe, "tests.training.rewards:broken") as worker, pytest.raises(UserError) as error:
        worker.score(torch.rand(1, 2, 3, 4, 4), make_samples(1))
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
    worker.close()


def test_reward_that_hangs_ends_sampling(pipe):
    worker = reward_worker(pipe, "tests.training.rewards:hangs", timeout=0.2)
    with pytest.raises(UserError, match="has not answered for 0.2 s; raise reward_timeout"):
        list(Rollout(pipe, worker).generate([[sample] for sample in make_samples(2)], SIZE))


def test_nan_reward_stops(pipe):
    with reward_worker(pipe, "tests.training.rewards:always_nan") as worker:
        with pytest.raises(UserError, match="nan.*a red circle") as error:
            worker.score(torch.rand(1, 2, 3, 4, 4), make_samples(1))
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
    worker.close()


def test_none_is_told_and_skipped_like_nan(pipe):
    """TRL's word for a reward that does not apply."""
    videos = torch.rand(3, 2, 3, 4, 4)
    videos[:, 0, 0, 0, 0] = torch.tensor([0.1, 0.9, 0.2])
    with reward_worker(pipe, "tests.training.rewards:none_for_bright") as worker:
        with pytest.raises(UserError, match="^reward 'tests.training.rewards:none_for_bright': .* None among them.$"):
            worker.score(videos, make_samples(3))
    with reward_worker(pipe, "tests.training.rewards:none_for_bright", skip_bad=True) as worker:
        scores = worker.score(videos, make_samples(3))["reward"]
    assert scores.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(scores[[0, 2]], videos.flatten(1).mean(1)[[0, 2]])


def test_watched_rewards_do_not_count(pipe):
    worker = reward_worker(pipe, watched="tests.training.rewards:contrast")
    videos = torch.rand(2, 2, 3, 4, 4)
    trained = worker.score(videos, make_samples(2))
    both = worker.score(videos, make_samples(2), watched=True)
    assert list(both)[: len(trained)] == list(trained)
    assert "tests.training.rewards:contrast" not in trained
    torch.testing.assert_close(both["reward"], trained["reward"])
    assert "tests.training.rewards:contrast" in both
    worker.close()


def test_its_end_is_that_of_thread_and_rewards(pipe):
    closed = []
    with reward_worker(pipe, watched="tests.training.rewards:contrast") as worker:
        for reward_set in (worker.rewards, worker.watched):
            reward_set._resources.callback(closed.append, reward_set)
        worker.score(torch.rand(1, 2, 3, 4, 4), make_samples(1))
        thread = worker._thread._thread
    assert closed == [worker.rewards, worker.watched] and not thread.is_alive()
