import json
import math
from pathlib import Path

import pytest
import torch

from astrolabe_diffusers.reporting.comparison import Evaluation, compare, comparison_table, mean_interval, mean_text
from astrolabe_diffusers.reporting.machine import peak_memory_gb
from astrolabe_diffusers.reporting.markdown import markdown_table
from astrolabe_diffusers.reporting.report import append_jsonl, cut_jsonl, duration, score_statistics, tag, tags


def test_log_is_cut_at_the_step_that_is_resumed(tmp_path):
    path = tmp_path / "log.jsonl"
    assert cut_jsonl(path, 5) == []
    for step in (1, 2, 3):
        append_jsonl(path, {"step": step})
    with path.open("a") as file:
        file.write('{"step": 4, "rew')  # killed here
    assert cut_jsonl(path, 2) == [{"step": 1}, {"step": 2}]
    append_jsonl(path, {"step": 3})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert cut_jsonl(path, -1) == [] and path.read_text() == ""


def test_table_has_every_score_with_its_interval():
    scores = {"reward": [0.0, 0.5], "match": [0.0, 0.5], "match/color": [1.0, 1.0], "sharpness": [0.3, 0.5]}
    after = {"reward": [0.5, 0.75], "match": [0.5, 0.75], "match/color": [1.0, 0.5], "sharpness": [0.3, 0.5]}
    compared = compare(Evaluation(0, scores), Evaluation(80, after))
    assert list(compared["reward"].values())[:3] == [0.25, 0.625, 0.375]
    lines = comparison_table(compared, ["match"]).splitlines()
    assert [line.split()[0] for line in lines] == [
        "before", "trained", "reward", "match", "match/color", "only", "sharpness",
    ]  # fmt: skip
    assert lines[2].split()[1:4] == ["0.2500", "0.6250", "+0.3750"]
    assert lines[2].endswith("[+0.1300, +0.6200]")  # 0.375 +- 1.96 * 0.1768 / sqrt(2)
    assert lines[-1].endswith("[+0.0000, +0.0000]")


def test_one_pair_has_no_interval():
    compared = compare(Evaluation(0, {"reward": [0.9]}), Evaluation(80, {"reward": [0.31]}))
    line = comparison_table(compared, ["match"]).splitlines()[-1]
    assert line.split() == ["reward", "0.9000", "0.3100", "-0.5900"]
    nothing = compare(Evaluation(0, {"reward": [math.nan]}), Evaluation(80, {"reward": [0.31]}))
    assert comparison_table(nothing, ["match"]).splitlines()[-1].split() == ["reward", "nan", "0.3100", "nan"]
    assert mean_text(mean_interval([0.5])) == "0.5000"
    assert mean_text(mean_interval([0.0, 1.0])) == "0.5000 \u00b1 0.9800"


def test_logs_are_json(tmp_path):
    """By a reader that takes no NaN; what was NaN is so again when a run goes on."""
    evaluation = Evaluation(3, {"reward": [0.5, math.nan], "match": [math.nan, math.nan]})
    append_jsonl(tmp_path / "log.jsonl", evaluation.to_json() | {"loss": math.inf})
    (record,) = cut_jsonl(tmp_path / "log.jsonl", 5)
    text = (tmp_path / "log.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == record
    assert record["scores"] == {"reward": [0.5, None], "match": [None, None]} and record["loss"] is None
    assert record["mean"] == {"reward": 0.5, "match": None}
    assert repr(Evaluation.from_json(record)) == repr(evaluation)


def test_markdown_table():
    assert markdown_table([["", "base"], ["match", "0.5"]]).splitlines() == [
        "|       | base |",
        "| ----- | ---: |",
        "| match |  0.5 |",
    ]


def test_statistics_of_scores():
    scores = torch.tensor([1.0, 3.0, 5.0, 5.0, math.nan, 2.0])
    # Groups of two: spreads 1, 0, and 0 of the one that is finite.
    expected = {"mean": 3.2, "std": 2.56**0.5, "min": 1.0, "max": 5.0, "group_std": 1 / 3}
    assert score_statistics(scores, group_size=2) == pytest.approx(expected)
    assert score_statistics(scores[:2]) == {"mean": 2.0, "std": 1.0, "min": 1.0, "max": 3.0}
    assert score_statistics(torch.tensor([math.nan]), group_size=1) == {}


def test_names_in_the_trackers():
    assert tag("kl") == "train/kl" and tag("zero_spread_groups") == "train/zero_spread_groups"
    assert tag("seconds_sampling") == "speed/seconds_sampling"
    assert tag("samples_per_second") == "speed/samples_per_second"
    assert tags("reward", {"match/color": {"mean": 0.5}}) == {"reward/match/color/mean": 0.5}


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.7, "1:00"), (61, "1:01"), (3661, "1:01:01")])
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_memory_is_the_systems_figure():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    expected = int(status["VmHWM"].split()[0]) * 1024 / 1e9
    assert peak_memory_gb(torch.device("cpu")) == pytest.approx(expected, rel=0.05)
