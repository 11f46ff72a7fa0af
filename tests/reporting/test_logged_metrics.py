"""A run logs what docs/logged_metrics.md says, and nothing else."""

import json
import re
from pathlib import Path

import pytest

from astrolabe_diffusers.training import NFTConfig, NFTTrainer
from astrolabe_diffusers.training.awm import AWMTrainer
from astrolabe_diffusers.training.cm_grpo import CMGRPOTrainer
from tests.reporting.test_trackers import events_of
from tests.training.helpers import ALL_REPORTS, BRIGHTNESS, tiny_settings


PAGE = Path(__file__).parents[2] / "docs" / "logged_metrics.md"
CONTRAST, FLICKER = "tests.training.rewards:contrast", "flicker"
SHORT = {"num_frames": 9, "max_train_steps": 1, "checkpointing_steps": 10}
TRAINED = ("reward", BRIGHTNESS, CONTRAST, *(f"{BRIGHTNESS}/{color}" for color in ("red", "green", "blue")))


def tables():
    """By heading of the page, the names in its tables' first two columns; NAME stands for a score."""
    found = {}
    for title, body in re.findall(r"^## (.+?)$(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S):
        rows = [line.split("|") for line in body.splitlines() if line.startswith("| `") or line.startswith("| |")]
        found[title] = [set(re.findall("`([^`]+)`", " ".join(row[i] for row in rows))) for i in (1, 2)]
    return found


def for_scores(names, scores):
    return {name.replace("NAME", score) for name in names for score in scores}


def flat(record, prefix=""):
    """Names of nested values, `a.b`."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def train(kind, config_class, model, folder, **values):
    settings = tiny_settings(model, folder, **ALL_REPORTS | SHORT | values)
    settings["rewards"] = {BRIGHTNESS: 1, CONTRAST: 1}
    kind(config=config_class(**settings)).train()


@pytest.fixture(scope="module")
def run(model_folder, tmp_path_factory):
    """The folder of a run of NFT that logs all that there is."""
    folder = tmp_path_factory.mktemp("run")
    options = {"eval_rewards": FLICKER, "selective_kl": True, "reference_reset_kl": 0.5}
    train(NFTTrainer, NFTConfig, model_folder, folder, **options)
    return folder


ALGORITHMS = ("Every algorithm", "NFT, AWM and CM-GRPO", "NFT")


def test_files_hold_what_the_page_says(run):
    page = tables()
    metrics = set(flat(json.loads((run / "metrics.jsonl").read_text())))
    assert metrics == set().union(*(for_scores(page[part][0], TRAINED) for part in ALGORITHMS))
    evaluation = set(flat(json.loads((run / "eval.jsonl").read_text().splitlines()[-1])))
    assert evaluation == for_scores(page["Held-out videos"][0], (*TRAINED, FLICKER))


@pytest.mark.parametrize(("kind", "own"), [(AWMTrainer, ()), (CMGRPOTrainer, ("CM-GRPO",))])
def test_others_log_what_the_page_says(kind, own, model_folder, tmp_path):
    train(kind, kind.config_class, model_folder, tmp_path, report_to="none", num_eval_videos=0, eval_seeds=1)
    page, metrics = tables(), set(flat(json.loads((tmp_path / "metrics.jsonl").read_text())))
    assert metrics == set().union(*(for_scores(page[part][0], TRAINED) for part in (*ALGORITHMS[:2], *own)))


def test_trackers_show_what_the_page_says(run):
    page = tables()
    tags = events_of(run / "logs").Tags()
    shown = set(tags["scalars"]) | set(tags["histograms"]) | set(tags["images"])
    expected = set().union(*(for_scores(page[part][1], TRAINED) for part in ALGORITHMS))
    assert shown == expected | for_scores(page["Held-out videos"][1], (*TRAINED, FLICKER))


def test_figures_agree(run):
    """Between files and trackers, and those that are made of others."""
    events, record = events_of(run / "logs"), json.loads((run / "metrics.jsonl").read_text())
    assert events.Histograms("reward/reward")[0].histogram_value.num == 4
    assert [image.step for image in events.Images("eval/videos")] == [0, 1]
    statistics = record["statistics"]["reward"]
    assert statistics["mean"] == pytest.approx(record["reward"])
    assert statistics["group_std"] == pytest.approx(record["group_std"], rel=1e-4)
    assert record["samples_per_second_sampling"] == pytest.approx(4 / record["seconds_sampling"])
    logged = events.Scalars(f"reward/{BRIGHTNESS}/max")[0].value
    assert logged == pytest.approx(record["statistics"][BRIGHTNESS]["max"])
