"""Several rewards as one: sums, parts, threads, and what is refused."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from astrolabe_diffusers.rewards import Reward, RewardError, RewardOutput, RewardSet, get_reward
from tests.rewards.placed_rewards import Bright, make_batch


PATH = "tests.rewards.test_reward_set"
CAPTIONS = ["a red circle moves right on a black background", "a blue cross moves up on a white background"]


def mean_red(videos, prompts, metadata):
    return videos[:, :, 0].mean((1, 2, 3)), {"blue": videos[:, :, 2].mean((1, 2, 3))}


def one_nan(videos, prompts, metadata):
    return [0.5] * (len(prompts) - 1) + [float("nan")], {}


def one_infinity(videos, prompts, metadata):
    return [float("-inf")] + [0.5] * (len(prompts) - 1), {}


def per_frame(videos, prompts, metadata):
    return videos.mean((2, 3, 4)), {}


def short_info(videos, prompts, metadata):
    return videos.mean((1, 2, 3, 4)), {"part": [1.0]}


def learned(videos, prompts, metadata):
    weight = torch.nn.Parameter(torch.ones(()))
    score = weight * videos.mean((1, 2, 3, 4))
    return score, {"records_gradients": [float(score.requires_grad)] * len(prompts)}


def test_total_is_the_weighted_sum_of_raw_scores():
    videos = torch.rand(2, 4, 3, 16, 16)
    weights = {"sharpness": 2.0, "flicker": -0.5, f"{PATH}:mean_red": 3.0, "motion_smoothness": 0.0}
    output = RewardSet(weights)(videos, CAPTIONS)
    assert list(output.scores) == list(weights)
    for name in ("sharpness", "flicker", "motion_smoothness"):
        torch.testing.assert_close(output.scores[name], get_reward(name).score(videos, CAPTIONS).scores)
    expected = 2 * output.scores["sharpness"] - 0.5 * output.scores["flicker"] + 3 * videos[:, :, 0].mean((1, 2, 3))
    torch.testing.assert_close(output.total, expected)
    assert output.total.dtype == torch.float32 and output.total.shape == (2,)


def test_parts_are_named_after_their_reward():
    videos = torch.rand(2, 4, 3, 64, 64)
    output = RewardSet({"tiny_shapes_prompt_match": 1.0, f"{PATH}:mean_red": 1.0})(videos, CAPTIONS)
    assert sorted(output.info) == sorted(
        [f"tiny_shapes_prompt_match/{part}" for part in ("color", "shape", "background", "direction")]
        + [f"{PATH}:mean_red/blue"]
    )
    torch.testing.assert_close(output.info[f"{PATH}:mean_red/blue"], videos[:, :, 2].mean((1, 2, 3)))


def test_metadata_reaches_the_rewards():
    seen = []

    def remember(videos, prompts, metadata):
        seen.append(metadata)
        return torch.zeros(len(prompts))

    rewards = RewardSet({"remember": 1.0}, rewards={"remember": remember})
    rewards(torch.rand(2, 1, 3, 8, 8), CAPTIONS, [{"a": 1}, {"a": 2}])
    assert seen == [[{"a": 1}, {"a": 2}]]


def test_functions_and_objects_are_rewards_of_this_process():
    def brightness(videos, prompts, metadata, fps, scale=1.0):
        return fps * scale * videos.mean((1, 2, 3, 4))

    videos, weights = torch.rand(2, 4, 3, 16, 16), {"brightness": 2.0, "bright": 1.0, "sharpness": 1.0}
    objects = {"brightness": brightness, "bright": Bright(), "sharpness": "sharpness"}
    placement = {"brightness": "cpu", "bright": "offload"}
    options = {"brightness": {"scale": 3.0}}
    with RewardSet(weights, options, placement, fps=8.0, rewards=objects) as rewards:
        output = rewards(videos, CAPTIONS)
    means = videos.mean((1, 2, 3, 4))
    torch.testing.assert_close(output.scores["brightness"], 24 * means)
    torch.testing.assert_close(output.total, 49 * means + get_reward("sharpness").score(videos, CAPTIONS).scores)
    for text in ("process", "http://127.0.0.1:9", "trainer|process:cpu"):
        with pytest.raises(ValueError, match=r"'bright' is an object of this process: it cannot be ") as error:
            RewardSet(weights, placement={"bright": text}, rewards=objects)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"'brigth' \(did you mean bright.*\) is none of the rewards"):
        RewardSet(weights, rewards={"brigth": Bright()})


def test_scoring_in_a_worker_thread_records_no_gradients_and_its_scores_may_enter_a_loss():
    with ThreadPoolExecutor(1) as executor:
        output = executor.submit(RewardSet({f"{PATH}:learned": 1.0}), torch.rand(2, 2, 3, 8, 8), CAPTIONS).result()
    assert output.info[f"{PATH}:learned/records_gradients"].tolist() == [0, 0]
    weight = torch.ones(2, requires_grad=True)
    for values in (output.total, output.scores[f"{PATH}:learned"], output.info[f"{PATH}:learned/records_gradients"]):
        (weight * values).sum().backward()
    torch.testing.assert_close(weight.grad, 2 * output.total)


@pytest.mark.parametrize("function, value, index", [("one_nan", "nan", 1), ("one_infinity", "-inf", 0)])
def test_a_score_that_is_not_finite_names_reward_prompt_and_index(function, value, index):
    with pytest.raises(RewardError) as caught:
        RewardSet({"flicker": 1.0, f"{PATH}:{function}": 1.0})(torch.rand(2, 2, 3, 8, 8), CAPTIONS)
    message = str(caught.value)
    assert f"reward '{PATH}:{function}' gave {value} for sample {index}, prompt {CAPTIONS[index]!r}" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "function, message", [("per_frame", r"reward .*per_frame.*\[2, 3\]"), ("short_info", r"info 'part'.*\[1\]")]
)
def test_a_wrong_shape_is_refused(function, message):
    with pytest.raises(RewardError, match=message):
        RewardSet({f"{PATH}:{function}": 1.0})(torch.rand(2, 3, 3, 8, 8), CAPTIONS)


class Returns(Reward):
    def __init__(self, output):
        self.output = output

    def score(self, videos, prompts, metadata=None):
        return self.output


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (lambda *batch: [0.5, None], "reward 'mine': what the function returns must hold numbers.* None among them"),
        (lambda *batch: None, "reward 'mine': what the function returns must hold numbers.* it is None"),
        (lambda *batch: ["a", "b"], r"reward 'mine': what .* it is \['a', 'b'\]"),
        (lambda *batch: ([1, 2], {"part": [1, None]}), "reward 'mine': info 'part' must hold .* None among them"),
        (Returns(RewardOutput([0.5, None])), "reward 'mine' must hold numbers, one a video, and there is None among"),
        (Returns(torch.ones(2)), "reward 'mine' must return a RewardOutput, not a Tensor"),
        (Returns(None), "reward 'mine' must return a RewardOutput, not a NoneType"),
    ],
)
def test_what_is_no_number_names_the_reward(reward, words):
    with pytest.raises(RewardError, match=words) as error:
        RewardSet({"flicker": 1.0, "mine": 1.0}, rewards={"mine": reward})(torch.rand(2, 3, 3, 8, 8), CAPTIONS)
    assert "\n" not in str(error.value)


PLACED = "tests.rewards.placed_rewards"
BRIGHT, ENDS, FIRST = (f"{PLACED}:{name}" for name in ("Bright", "EndFrames", "first_pixel"))


@pytest.mark.parametrize("place", ["trainer", "cpu", "offload"])
def test_a_reward_that_writes_into_what_it_is_given_changes_nothing_for_others(place):
    batch = make_batch([7, 200], frames=3, size=8)
    kept = copy.deepcopy(batch)
    spoilers = [f"{PLACED}:in_place", f"{PLACED}:InPlace"]
    names = [*spoilers, BRIGHT, ENDS, FIRST]
    rewards = RewardSet(dict.fromkeys(names, 1.0), placement=dict.fromkeys(names, place))
    output = rewards(*batch)
    rewards.close()
    alone = RewardSet(dict.fromkeys(names[2:], 1.0))(*copy.deepcopy(kept))
    for name in names[2:]:
        torch.testing.assert_close(output.scores[name], alone.scores[name])
    assert torch.equal(batch[0], kept[0]) and batch[1:] == kept[1:]


def test_a_reward_that_is_given_broken_frames_is_not_asked():
    videos = torch.rand(3, 2, 3, 8, 8)
    words = r"frames of sample 1, prompt 'b', are no finite numbers \(1 of 3 videos\)"
    for value in (float("nan"), float("inf")):
        videos[1, 1, 0, 3, 3] = value
        with pytest.raises(RewardError, match=words):
            RewardSet({ENDS: 1.0})(videos, ["a", "b", "c"])


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), float("-inf"), None, "1"])
def test_a_weight_is_a_finite_number(weight):
    with pytest.raises(ValueError, match="the weight of 'sharpness' must be a finite number, not "):
        RewardSet({"flicker": 1.0, "sharpness": weight})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are such devices")
@pytest.mark.parametrize("place", ["cuda:1", "process:cuda:1", "trainer|process:cuda:7", "cuda"])
def test_a_device_that_is_not_there_is_one_line(place):
    with pytest.raises(ValueError, match=r"there is no device 'cuda(:\d)?': torch finds no GPU here"):
        RewardSet({"sharpness": 1.0}, placement={"sharpness": place})


def test_bad_input_is_one_clear_line():
    with pytest.raises(ValueError, match=r"'sharpnes' \(did you mean sharpness\?\) is none of the rewards sharpness"):
        RewardSet({"sharpness": 1.0}, placement={"sharpnes": "process"})
    with pytest.raises(ValueError, match="videos must be floats .*; got torch.uint8"):
        RewardSet({"flicker": 1.0})(torch.zeros(1, 2, 3, 8, 8, dtype=torch.uint8), ["a"])
    with pytest.raises(ValueError, match="metadata must be None or one dict a video; got 2 for 1"):
        RewardSet({"flicker": 1.0})(torch.zeros(1, 2, 3, 8, 8), ["a"], [{}, {}])
    with pytest.raises(ValueError, match="no reward is named"):
        RewardSet({})
    for names in ("sharpness", ["sharpness"]):
        with pytest.raises(ValueError, match="weights must be by name, such as .*, not .*sharpness"):
            RewardSet(names)
    with pytest.raises(ValueError, match="prompts must be a list with one a video, not the text 'ab'"):
        RewardSet({"flicker": 1.0})(torch.rand(2, 2, 3, 8, 8), "ab")
    with pytest.raises(ValueError, match=r"unknown reward 'sharpnes' \(did you mean sharpness\?\); known: "):
        RewardSet({"sharpnes": 1.0})
    with pytest.raises(ValueError, match="one prompt each; got .* and 1 prompts"):
        RewardSet({"flicker": 1.0})(torch.rand(2, 2, 3, 8, 8), ["only one"])
