"""README's section on rewards, followed to the letter."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from astrolabe_diffusers.files.video import VideoWriter
from astrolabe_diffusers.rewards import RewardSet
from astrolabe_diffusers.training.build import make_rewards
from astrolabe_diffusers.training.nft import NFTConfig


ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "README.md").read_text().split("\n## Rewards\n")[1].split("\n## ")[0]
((PYTHON),) = re.findall(r"```python\n(# my_rewards.py\n.*?)```", SECTION, re.S)
SCORE, _ = re.findall(r"```bash\n(.*?)```", SECTION, re.S)


@pytest.fixture
def checkout(tmp_path):
    """A folder as the reader's checkout, with the file of the reader in it."""
    for name in ("examples", "astrolabe_diffusers"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my_rewards.py").write_text(PYTHON)
    return tmp_path


def test_a_reward_has_ten_lines():
    code = PYTHON.split("class ")[1].strip().splitlines()
    assert len([line for line in code if line]) <= 10


def test_the_rewards_of_the_file(checkout, monkeypatch):
    monkeypatch.syspath_prepend(checkout)
    brightness = re.search(r"--rewards (my_rewards:brightness=1)", SECTION)[1]
    videos = torch.rand(3, 2, 3, 8, 8)
    rewards, _ = make_rewards(NFTConfig(rewards=brightness), 16)
    torch.testing.assert_close(rewards(videos, [""] * 3).total, videos.mean((1, 2, 3, 4)))
    near = RewardSet({"my_rewards:NearBrightness": 1.0})(videos, [""] * 3)
    torch.testing.assert_close(near.total, 1 - (videos.mean((1, 2, 3, 4)) - 0.5).abs())
    monkeypatch.delitem(sys.modules, "my_rewards")


def test_options_of_the_text():
    options = re.search(r"--reward_options (dynamic_degree\S+?)`", SECTION)[1]
    NFTConfig(reward_options=options)
    assert NFTConfig(reward_options=options).reward_options == {
        "dynamic_degree": {"fps": 8},
        "brisque": {"frames": "stride:4"},
    }


def test_every_place_of_the_table_is_one(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    table = SECTION.split("reward_placement name=place")[1].split("\n\n")[0]
    places = [place for row in table.splitlines()[2:] for place in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert places == ["trainer", "offload", "cuda:1", "cpu", "process", "process:cuda:1", "http://host:port"]
    from astrolabe_diffusers.rewards.reward_set import PLACEMENTS, Placement

    for place in places:
        Placement.parse(place, "sharpness", "sharpness")
        assert f"'{place}'" in PLACEMENTS or place == "cpu"


def test_score_command(checkout):
    (checkout / "videos").mkdir()
    with VideoWriter(checkout / "videos" / "a.mp4", 32, 48, 16) as writer:
        writer.write(np.full((5, 32, 48, 3), 51, np.uint8))
    # `python` is the one of this environment.
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    run = subprocess.run(SCORE, shell=True, cwd=checkout, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    scores = json.loads((checkout / "videos" / "scores.json").read_text())["mean"]
    assert scores["my_rewards:NearBrightness"] == pytest.approx(1 - abs(51 / 255 - 0.7), abs=0.01)
    assert "my_rewards:NearBrightness" in run.stdout
