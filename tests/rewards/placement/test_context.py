"""The frames before a video, for rewards that look at them, wherever these are scored."""

import pytest
import torch

from astrolabe_diffusers.rewards import RewardSet
from astrolabe_diffusers.rewards.placement.local import LocalRewards
from astrolabe_diffusers.rewards.placement.server import create_app
from astrolabe_diffusers.rewards.placement.wire import ScoringJob, pack_job, unpack_job
from tests.rewards.http_server import serving
from tests.rewards.placed_rewards import make_batch


BEFORE = "tests.rewards.placed_rewards:Before"
FIRST = "tests.rewards.placed_rewards:first_pixel"


def context_of(levels):
    """Frames of these levels, of 255, one list a video."""
    return torch.tensor(levels, dtype=torch.float32).view(len(levels), -1, 1, 1, 1).expand(-1, -1, 3, 4, 4) / 255


@pytest.mark.parametrize("place", ["trainer", "process", "server"])
def test_each_gets_the_last_frames_that_it_looks_at(place):
    def check(placement):
        with RewardSet({BEFORE: 1.0, FIRST: 1.0}, placement=placement, timeout=60) as rewards:
            assert rewards.num_context_frames == 3
            batch = make_batch([7, 200])
            longer = rewards(*batch, context_of([[9, 1, 2, 3], [9, 4, 5, 6]]))
            assert longer.scores[BEFORE].tolist() == [1 + 2e3 + 3e6, 4 + 5e3 + 6e6]
            assert longer.info[f"{BEFORE}/frames"].tolist() == [3, 3]
            shorter = rewards(*batch, context_of([[1], [2]]))
            assert shorter.scores[BEFORE].tolist() == [1, 2] and shorter.info[f"{BEFORE}/frames"].tolist() == [1, 1]
            none = rewards(*batch)
            assert none.scores[BEFORE].tolist() == [0, 0] and none.info[f"{BEFORE}/frames"].tolist() == [0, 0]
            assert torch.equal(none.scores[FIRST], longer.scores[FIRST])

    if place == "server":
        with serving(create_app(LocalRewards([BEFORE, FIRST]))) as url:
            check({BEFORE: url, FIRST: url})
    else:
        check({BEFORE: place})


def test_who_looks_at_none_is_sent_none():
    with RewardSet({FIRST: 1.0}) as rewards:
        assert rewards.num_context_frames == 0
    videos, prompts, metadata = make_batch([7])
    job = ScoringJob.make(videos, {FIRST: None}, prompts, metadata, context_of([[1, 2]]))
    assert job.context is None and unpack_job(pack_job(job)).context is None


def test_jobs_of_one_kind_have_as_many():
    videos, prompts, metadata = make_batch([7])
    jobs = [
        ScoringJob.make(videos, {BEFORE: None}, prompts, metadata, context_of([levels]), 3)
        for levels in ([1], [1, 2], [3, 4])
    ]
    jobs = [unpack_job(pack_job(job)) for job in jobs]
    assert jobs[0].kind() != jobs[1].kind() == jobs[2].kind()
    assert ScoringJob.join(jobs[1:]).context[:, :, 0, 0, 0].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("context", [torch.zeros(2, 1, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, 1, 3, 4, 4)])
def test_what_is_no_context_is_refused(context):
    videos, prompts, metadata = make_batch([7])
    job = ScoringJob.make(videos, {BEFORE: None}, prompts, metadata)
    job.context = context
    with pytest.raises(ValueError, match="the context must be uint8"):
        unpack_job(pack_job(job))
