import pytest

from astrolabe_diffusers.shareable import shareable, shareable_value
from tests.training.helpers import config


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/me/models/tiny", "tiny"),
        ("~/models/tiny", "tiny"),
        ("../models/tiny", "tiny"),
        ("NAME=/home/me/run", "NAME=run"),
        ("python /home/me/judge.py --fast", "python judge.py --fast"),
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        ("stride:4", "stride:4"),
        ("cuda:1", "cuda:1"),
        ("my_rewards:brightness", "my_rewards:brightness"),
        ("x" * 5000, "x" * 5000),
        ("http://rewards.internal:8000/v1", None),
        ("rewards.internal:8000", None),
        ("localhost:8000", None),
        ("process|http://rewards.internal", None),
        (["a", "http://rewards.internal"], ["a"]),
        ({"url": "rewards", "frames": 4, "judge_host": "rewards", "hosts": 2}, {"frames": 4, "hosts": 2}),
        ({"a/run": 0.7, "/home/me/run": 0.3, "/home/you/run": 0.1}, {"a/run": 0.7, "run": 0.3, "run (2)": 0.1}),
        (0.5, 0.5),
        (None, None),
    ],
)
def test_what_leaves(value, expected):
    assert shareable_value(value) == expected


def test_a_local_folder_is_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    assert shareable_value("runs/a") == "a" and shareable_value("runs/b") == "runs/b"


def test_settings_without_places_of_rewards():
    settings = shareable(config(reward_placement={"flicker": "http://rewards.internal"}, rank=3))
    assert settings["rank"] == 3 and not {"reward_placement", "reward_timeout"} & settings.keys()
