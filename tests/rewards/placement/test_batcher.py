"""What several clients ask, as one batch."""

import pytest

from astrolabe_diffusers.rewards import RewardError
from astrolabe_diffusers.rewards.placement.batcher import Batcher
from tests.rewards.placed_rewards import Recorded, make_job


OBEYS = "tests.rewards.placed_rewards:obeys"


def test_what_waits_is_scored_together_if_it_fits():
    rewards = Recorded()
    batcher = Batcher(rewards, max_batch=4, max_waiting=10)
    jobs = [[1], [2, 3], [4, 5], [6, 7, 8], [9]]
    futures = [batcher.submit(make_job(jobs[0]))]
    assert rewards.started.wait(20)
    futures += [batcher.submit(make_job(numbers)) for numbers in jobs[1:]]
    futures.append(batcher.submit(make_job([10], size=6)))
    rewards.go.set()
    for numbers, future in zip([*jobs, [10]], futures):
        assert future.result(20)[OBEYS].info["prompt"].tolist() == numbers
    assert rewards.batches == [[1], [2, 3, 4, 5], [6, 7, 8, 9], [10]]


def test_a_client_does_not_suffer_from_the_videos_of_another():
    rewards = Recorded()
    batcher = Batcher(rewards, max_batch=8, max_waiting=10)
    first = batcher.submit(make_job([0]))
    assert rewards.started.wait(20)
    futures = [batcher.submit(make_job([i], act=act)) for i, act in enumerate(["too_few", "", "fail"])]
    gone = batcher.submit(make_job([5]))
    gone.cancel()
    rewards.go.set()
    with pytest.raises(RewardError, match="but has shape"):
        futures[0].result(20)
    assert futures[1].result(20)[OBEYS].info["prompt"].tolist() == [1.0]
    with pytest.raises(ArithmeticError):
        futures[2].result(20)
    assert first.result(20) and [5] not in rewards.batches and [0, 1, 2] in rewards.batches


def test_a_full_queue_is_busy():
    rewards = Recorded()
    batcher = Batcher(rewards, max_batch=1, max_waiting=2)
    batcher.submit(make_job([1]))
    assert rewards.started.wait(20)
    assert batcher.submit(make_job([2])) and batcher.submit(make_job([3]))
    assert batcher.submit(make_job([4])) is None
    rewards.go.set()
