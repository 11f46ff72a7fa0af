"""Registration, the finding of rewards by name, and the naming of those that are objects."""

import sys
from functools import partial

import numpy as np
import pytest
import torch

from astrolabe_diffusers.rewards import (
    Flicker,
    FunctionReward,
    Reward,
    RewardOutput,
    Sharpness,
    get_reward,
    named_reward_funcs,
    register_reward,
)
from astrolabe_diffusers.rewards.registry import make_reward
from tests.rewards.placed_rewards import EndFrames, first_pixel


MODULE = """
import numpy as np
from astrolabe_diffusers.rewards import Reward, RewardOutput

class Brightness(Reward):
    def score(self, videos, prompts, metadata=None):
        return RewardOutput(videos.mean((1, 2, 3, 4)))

def brightness(videos, prompts, metadata):
    scores = videos.mean((1, 2, 3, 4)).double().numpy()
    return scores, {"length": [len(prompt) for prompt in prompts], "seen": np.array([m["seen"] for m in metadata])}

def without_info(videos, prompts, metadata):
    return videos.mean((1, 2, 3, 4)).tolist(), None

class NotAReward:
    pass

class Optional(Reward):
    def __init__(self, count: int = 3, rate: float = 1.0, path: str | None = None, flag: bool = False, bare=1,
                 free=None):
        self.values = (count, rate, path, flag, bare, free)

    def score(self, videos, prompts, metadata=None):
        return RewardOutput(videos.mean((1, 2, 3, 4)))

CONSTANT = 3
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    folder = tmp_path / "users"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "my_rewards.py").write_text(MODULE)
    (folder / "broken.py").write_text("import a_library_that_is_missing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "users"]:
        del sys.modules[name]


def test_built_in_rewards_are_registered():
    assert isinstance(get_reward("flicker"), Flicker)
    for name in ("tiny_shapes_prompt_match", "motion_smoothness", "sharpness"):
        assert isinstance(get_reward(name), Reward)


def test_register_reward_makes_a_name_known_once():
    @register_reward("constant_of_this_test")
    class Constant(Reward):
        def score(self, videos, prompts, metadata=None):
            return RewardOutput(torch.full((len(videos),), 2.0))

    assert get_reward("constant_of_this_test").score(torch.zeros(3, 1, 3, 4, 4), [""] * 3).scores.tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match="'constant_of_this_test' is taken by .*Constant"):
        register_reward("constant_of_this_test")(Constant)


@pytest.mark.parametrize("separator", [":", "."])
def test_dotted_path_of_a_class(user_module, separator):
    videos = torch.rand(2, 3, 3, 4, 4)
    output = get_reward(f"users.my_rewards{separator}Brightness").score(videos, ["a", "b"])
    torch.testing.assert_close(output.scores, videos.mean((1, 2, 3, 4)))


@pytest.mark.parametrize("separator", [":", "."])
def test_dotted_path_of_a_function(user_module, separator):
    videos = torch.rand(2, 3, 3, 4, 4)
    reward = get_reward(f"users.my_rewards{separator}brightness")
    output = reward.score(videos, ["a", "bcd"], [{"seen": 1}, {"seen": 0}])
    assert output.scores.dtype == torch.float32
    torch.testing.assert_close(output.scores, videos.mean((1, 2, 3, 4)))
    assert {name: part.tolist() for name, part in output.info.items()} == {"length": [1, 3], "seen": [1, 0]}
    assert all(part.dtype == torch.float32 for part in output.info.values())


def test_function_may_return_lists_and_no_info(user_module):
    output = get_reward("users.my_rewards:without_info").score(torch.ones(2, 1, 3, 4, 4), ["a", "b"])
    assert output.scores.tolist() == [1, 1] and output.info == {}
    assert np.asarray(output.scores).dtype == np.float32


@pytest.mark.parametrize(
    "name, message",
    [
        ("beauty", "unknown reward 'beauty'; known: .*flicker, .*motion_smoothness, .*sharpness"),
        ("motion_smoothnes", r"'motion_smoothnes' \(did you mean motion_smoothness.*\?\); known: .*flicker"),
        ("users.nowhere:Brightness", "no module named 'users.nowhere'.*known: "),
        ("nowhere.at.all", "no module named 'nowhere'.*PYTHONPATH"),
        ("users.my_rewards:Brihgtness", r"users.my_rewards has no such attribute \(did you mean Brightness"),
        ("users.my_rewards:CONSTANT", "holds a int there"),
        ("users.my_rewards:NotAReward", "neither a Reward subclass nor a function"),
        ("users.my_rewards:", "unknown reward"),
        ("sharpness=0.5", "'sharpness=0.5' has a weight, where rewards are only named: sharpness.$"),
    ],
)
def test_unknown_rewards_are_one_clear_line(user_module, name, message):
    with pytest.raises(ValueError, match=message) as caught:
        get_reward(name)
    assert "\n" not in str(caught.value)


def test_a_missing_import_inside_the_users_module_is_not_hidden(user_module):
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_missing"):
        get_reward("users.broken:Brightness")


@pytest.mark.parametrize(
    "option, value, wanted",
    [
        ("count", "abc", "a whole number"), ("count", 2.5, "a whole number"), ("count", True, "a whole number"),
        ("rate", "abc", "a number"), ("rate", float("nan"), "a number"), ("rate", None, "a number"),
        ("path", 3, "text or null"), ("flag", "yes", "true or false"), ("bare", "abc", "a number"),
    ],
)  # fmt: skip
def test_options_are_of_the_type_that_a_reward_declares(user_module, option, value, wanted):
    with pytest.raises(ValueError) as caught:
        get_reward("users.my_rewards:Optional", **{option: value})
    assert str(caught.value) == (
        f"the option {option!r} of reward 'users.my_rewards:Optional' must be {wanted}, not {value!r}."
    )


def test_what_fits_is_given_as_it_is(user_module):
    options = {"count": 5, "rate": 2, "path": None, "flag": True, "bare": 0.5, "free": [1]}
    assert get_reward("users.my_rewards:Optional", **options).values == (5, 2, None, True, 0.5, [1])
    with pytest.raises(ValueError, match="option 'fps' of reward 'dynamic_degree' must be a number, not 'abc'"):
        get_reward("dynamic_degree", fps="abc")
    with pytest.raises(ValueError, match="option 'dimensions' of reward 'videoalign_score' must be a list, not 3"):
        get_reward("videoalign_score", dimensions=3)
    with pytest.raises(ValueError, match="must be positive, not inf"):
        get_reward("dynamic_degree", fps=float("inf"))


def test_functions_may_return_bare_scores():
    videos = torch.rand(2, 3, 3, 4, 4)
    means = videos.mean((1, 2, 3, 4))
    for scores in (means, means.double().numpy(), means.tolist(), tuple(means.tolist()), [*means], (means, None)):
        output = make_reward("mine", lambda *videos, scores=scores: scores, {}).score(videos, ["", ""])
        torch.testing.assert_close(output.scores, means)
        assert output.info == {}
    output = make_reward("mine", lambda *videos: (means.tolist(), {"length": [1, 2]}), {}).score(videos, ["", ""])
    assert output.info["length"].tolist() == [1.0, 2.0]


def test_options_of_functions_and_objects():
    def by_rate(videos, prompts, metadata, fps, scale: float = 1.0):
        return [fps * scale] * len(videos)

    reward = make_reward("mine", by_rate, {"scale": 2.0}, {"fps": 8.0, "other": 1})
    assert reward.score(torch.rand(2, 1, 3, 4, 4), ["", ""]).scores.tolist() == [16.0, 16.0]
    with pytest.raises(ValueError, match="reward 'mine' has no option 'size'; it has fps, scale"):
        make_reward("mine", by_rate, {"size": 1})
    with pytest.raises(ValueError, match="cannot be called with .videos, prompts, metadata.: missing .*'fps'"):
        make_reward("mine", by_rate, {})
    with pytest.raises(ValueError, match="cannot be called with .videos, prompts, metadata.: too many positional"):
        make_reward("mine", lambda videos, prompts: videos, {})
    made = Sharpness()
    assert make_reward("mine", made, {}, {"fps": 8.0}) is made
    assert isinstance(make_reward("mine", Sharpness, {}), Sharpness)
    with pytest.raises(ValueError, match="'mine' is made already and takes no option 'fps'"):
        make_reward("mine", made, {"fps": 8.0})


def test_a_list_of_rewards_gets_names():
    def brightness(videos, prompts, metadata):
        return videos.mean((1, 2, 3, 4))

    ends, sharp = EndFrames(), Sharpness()
    of_function = FunctionReward(first_pixel)
    named = named_reward_funcs([brightness, "flicker", sharp, ends, "package.module:fn", of_function, lambda *a: a[0]])
    assert list(named) == [
        "brightness", "flicker", "sharpness", "end_frames", "package.module:fn", "first_pixel", "lambda"
    ]  # fmt: skip
    assert named["brightness"] is brightness and named["sharpness"] is sharp and named["flicker"] == "flicker"
    assert list(named_reward_funcs([partial(brightness), Sharpness])) == ["brightness", "sharpness"]
    for twice in ([sharp, "sharpness"], [brightness, partial(brightness)]):
        with pytest.raises(ValueError, match="two rewards are called '(sharpness|brightness)'"):
            named_reward_funcs(twice)
    for wrong in ([3], [dict], 3, {"sharpness": 0.5}):
        with pytest.raises(ValueError, match="is neither a name, nor a function, nor a Reward"):
            named_reward_funcs(wrong)


@pytest.mark.parametrize("single", ["sharpness", Sharpness, Sharpness(), FunctionReward(first_pixel), first_pixel])
def test_a_single_reward_is_a_list_of_one(single):
    assert named_reward_funcs(single) == named_reward_funcs([single]) and len(named_reward_funcs(single)) == 1
