import pytest
import torch

from astrolabe_diffusers.rewards.placement.local import LocalRewards, OffloadedWeights
from astrolabe_diffusers.rewards.placement.wire import ScoringJob
from astrolabe_diffusers.rewards.reward_set import RewardSet
from tests.rewards.placed_rewards import Learned, make_batch


PATH = "tests.rewards.placed_rewards"
LEARNED, BRIGHT, FIRST = f"{PATH}:Learned", f"{PATH}:Bright", f"{PATH}:first_pixel"


def make_job(rewards, videos):
    _, prompts, metadata = make_batch(range(len(videos)))
    return ScoringJob.make(videos, rewards.requests(*videos.shape[1:2], *videos.shape[-2:]), prompts, metadata)


def test_a_reward_gets_what_it_requested():
    videos = torch.rand(2, 5, 3, 8, 12)
    output = LocalRewards([f"{PATH}:EndFrames"]).score(videos, ["", ""], None)[f"{PATH}:EndFrames"]
    assert {name: values.tolist() for name, values in output.info.items()} == {
        "F": [2.0, 2.0],
        "C": [3.0, 3.0],
        "H": [4.0, 4.0],
        "W": [6.0, 6.0],
    }
    torch.testing.assert_close(output.scores, videos[:, [0, 4]].mean((1, 2, 3, 4)), rtol=0, atol=0.02)


def test_a_job_is_scored_as_its_videos():
    rewards = LocalRewards([f"{PATH}:EndFrames", BRIGHT])
    videos = torch.randint(0, 256, (3, 5, 3, 8, 12)).float() / 255
    direct = rewards.score(videos, [""] * 3, None)
    for name, output in rewards.score_job(make_job(rewards, videos)).items():
        torch.testing.assert_close(output.scores, direct[name].scores)


def test_offloaded_weights_are_copies_inside_and_their_own_outside():
    reward = Learned()
    first, second = (layer.weight for layer in reward.network)
    home, values = first.data_ptr(), first.detach().clone()
    with OffloadedWeights([reward]):
        assert first.data_ptr() != home and torch.equal(first.cpu(), values)
        assert first is second and reward.network[0].weight is first
    assert first.data_ptr() == home and torch.equal(first, values)


@pytest.mark.gpu
def test_offloaded_rewards_are_on_the_gpu_while_they_score():
    rewards = LocalRewards([LEARNED], offload=True)
    weight = rewards.rewards[LEARNED].network[0].weight
    assert weight.is_pinned()
    assert rewards.score(*make_batch([1]))[LEARNED].scores.tolist() == [0.0]
    assert weight.device.type == "cpu" and weight.is_pinned()


def test_sampling_waits_for_offloaded_rewards():
    assert RewardSet({LEARNED: 1.0}, placement={LEARNED: "offload"}).takes_turns
    assert not RewardSet({LEARNED: 1.0}, placement={LEARNED: "cpu"}).takes_turns


def test_a_device_is_where_weights_and_videos_are():
    rewards = LocalRewards([f"{PATH}:Where"], device="meta")
    (reward,) = rewards.rewards.values()
    with pytest.raises(LookupError, match="videos on meta, weights on meta"):
        rewards.score(*make_batch([1]))
    assert reward.network.weight.device.type == "meta"


def test_rewards_of_a_job_have_their_own_data():
    """As a process or a server scores them."""
    spoilers = [f"{PATH}:in_place", f"{PATH}:InPlace"]
    names = [BRIGHT, f"{PATH}:EndFrames", FIRST]
    videos = torch.randint(0, 256, (2, 3, 3, 8, 8)).float() / 255
    rewards = LocalRewards([*spoilers, *names])
    job = make_job(rewards, videos)
    outputs = rewards.score_job(job)
    alone = LocalRewards(names).score_job(make_job(LocalRewards(names), videos))
    for name in names:
        torch.testing.assert_close(outputs[name].scores, alone[name].scores)
    assert torch.equal(job.frames[BRIGHT], (videos * 255).to(torch.uint8)) and job.metadata[1]["number"] == 1
