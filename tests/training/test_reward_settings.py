"""How a run's settings say what rewards are given and where they are scored."""

from dataclasses import replace

import pytest
import torch
import yaml

from astrolabe_diffusers.cli.train import parse_args
from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.rollout.sampling import Rollout
from astrolabe_diffusers.rollout.scoring import ScoringThread, gather_scores
from astrolabe_diffusers.training.build import make_rewards
from astrolabe_diffusers.training.nft import NFTConfig
from tests.training.helpers import SIZE, make_samples, policy_pipeline


FIRST = "tests.rewards.placed_rewards:first_pixel"


def test_command_line_and_yaml_say_the_same(tmp_path):
    arguments = ["--rewards", f"{FIRST}=1,sharpness=0.5", "--eval_rewards", "dynamic_degree"]
    arguments += ["--reward_options", f"{FIRST}.scale=2.5,dynamic_degree.fps=8"]
    arguments += ["--reward_placement", f"{FIRST}=process:cuda:1,sharpness=http://10.0.0.2:8000"]
    config = parse_args(arguments)
    assert config.reward_options == {FIRST: {"scale": 2.5}, "dynamic_degree": {"fps": 8}}
    assert config.reward_placement == {FIRST: "process:cuda:1", "sharpness": "http://10.0.0.2:8000"}
    config.save(tmp_path / "config.yaml")
    again = parse_args(["--config", str(tmp_path / "config.yaml")])
    assert again == config
    values = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert values["reward_options"]["dynamic_degree"] == {"fps": 8}


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("reward_options", "sharpness=3", "name.argument=value, comma-separated"),
        ("reward_options", "sharpness.x", "name.argument=value, comma-separated"),
        ("reward_options", {"sharpness": 3}, "{name: {argument: value}}"),
        ("reward_placement", "process", "name=place, comma-separated"),
        # As a list of names it would lose its weights.
        ("eval_rewards", {"sharpness": 0.5}, "names, comma-separated, not {'sharpness': 0.5}"),
        ("rewards", "sharpness=nan", "each weight a finite number"),
        ("reward_placement", {"sharpness": 1}, "name=place, comma-separated"),
        ("reward_timeout", -1, "at least 0.001"),
    ],
)
def test_values_of_another_form_are_refused(field, value, words):
    with pytest.raises(UserError, match=words):
        NFTConfig(**{field: value})


def test_rewards_get_their_options_in_both_sets():
    config = NFTConfig(
        rewards={FIRST: 1.0},
        eval_rewards=["dynamic_degree"],
        reward_options={FIRST: {"scale": 3.0}, "dynamic_degree": {"fps": 8}},
    )
    rewards, watched = make_rewards(config, 16)
    videos = torch.rand(1, 3, 3, 64, 64)
    output = rewards(videos, ["video 1"], [{"number": 1}])
    torch.testing.assert_close(output.total, 3 * videos[:, 0, 0, 0, 0])
    full = make_rewards(NFTConfig(eval_rewards=["dynamic_degree"]), 16)[1](videos, [""]).total
    torch.testing.assert_close(watched(videos, [""]).total, full / 2)


@pytest.mark.parametrize("place", ["trainer", "process"])
def test_rewards_know_the_frame_rate_of_the_videos(place):
    """The option `fps` of a reward, unless it is set."""
    values = dict(eval_rewards=["dynamic_degree"], reward_placement={"dynamic_degree": place})
    videos, totals = torch.rand(1, 3, 3, 64, 64), []
    for fps, options in ((16, {}), (24, {}), (24, {"dynamic_degree": {"fps": 8}})):
        watched = make_rewards(NFTConfig(**values, reward_options=options), fps)[1]
        totals.append(watched(videos, [""]).total)
        watched.close()
    torch.testing.assert_close(totals[1], totals[0] * 24 / 16)
    torch.testing.assert_close(totals[2], totals[0] / 2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"reward_options": {"flicker": {"x": 1}}},
            "reward_options: 'flicker' is none of the rewards of this run, sha",
        ),
        ({"reward_placement": {"flicker": "process"}}, "reward_placement: 'flicker' is none of the rewards"),
        ({"reward_placement": {"sharpness": "gpu"}}, "rewards: there is no place 'gpu'.*'process:cuda:1'"),
        ({"reward_options": {"sharpness": {"x": 1}}}, "rewards: reward 'sharpness' has no option 'x'; it has none"),
        (
            {"eval_rewards": ["dynamic_degree"], "reward_options": {"dynamic_degree": {"fps": "abc"}}},
            "eval_rewards: the option 'fps' of reward 'dynamic_degree' must be a number, not 'abc'",
        ),
        ({"rewards": {"sharpnes": 1.0}}, r"rewards: unknown reward 'sharpnes' \(did you mean sharpness\?\)"),
        ({"reward_placement": {"sharpness": "http://"}}, "rewards: an address of a server must be http://host:port"),
        ({"reward_placement": {"sharpness": "http://127.0.0.1:9"}}, "rewards: http://127.0.0.1:9 cannot be reached"),
    ],
)
def test_mistakes_end_the_run_before_the_model_is_loaded(settings, words):
    with pytest.raises(UserError, match=words) as error:
        make_rewards(NFTConfig(**{"rewards": {"sharpness": 1.0}} | settings), 16)
    assert "\n" not in str(error.value)


def test_a_rollout_is_scored_wherever_its_rewards_are():
    """The same scores in this process, in another one, and in turn with sampling; and one error when it dies."""
    pipe = policy_pipeline()
    samples = make_samples(4)
    name, ends = "tests.rewards.placed_rewards:middle", "tests.rewards.placed_rewards:EndFrames"

    def rollout(worker, samples):
        batches = [samples[:2], samples[2:]]
        return list(Rollout(pipe, worker).generate(batches, SIZE))

    scores = {}
    for place in ("trainer", "process", "offload"):
        config = NFTConfig(
            rewards={name: 1.0, ends: 0.5}, reward_placement=dict.fromkeys([name, ends], place), reward_timeout=60
        )
        worker = ScoringThread(pipe.vae, *make_rewards(config, 16))
        generated = rollout(worker, samples)
        if place == "offload":
            assert all(batch.scores.done() for batch in generated)
        scores[place], _ = gather_scores(generated, samples)
        if place == "process":
            deadly = replace(samples[2], prompt=replace(samples[2].prompt, metadata={"act": "die"}))
            with pytest.raises(UserError, match="ended twice over the same videos by SIGKILL") as error:
                gather_scores(rollout(worker, [*samples[:2], deadly, samples[3]]), samples)
            assert "\n" not in str(error.value)
        worker.close()
    torch.testing.assert_close(scores["offload"], scores["trainer"])
    # Frames travel with 256 steps.
    travelled = (scores["trainer"][name] * 255).round() / 255
    torch.testing.assert_close(scores["process"][name], travelled)
    assert len(travelled.unique()) >= 3
    torch.testing.assert_close(scores["process"][ends], scores["trainer"][ends])
