import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from astrolabe_diffusers.training.evaluation import Evaluation
from astrolabe_diffusers.training.plots import gif_bytes, video_images
from astrolabe_diffusers.training.report import (
    append_jsonl,
    comparison_rows,
    comparison_table,
    cut_jsonl,
    duration,
    log_gif,
    markdown_table,
    peak_memory_gb,
)


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
    rows = comparison_rows(Evaluation(0, scores), Evaluation(80, after))
    assert rows[0][:4] == ("reward", 0.25, 0.625, 0.375)
    lines = comparison_table(rows, ["match"]).splitlines()
    assert [line.split()[0] for line in lines] == [
        "before", "trained", "reward", "match", "match/color", "only", "sharpness",
    ]  # fmt: skip
    assert lines[2].split()[1:4] == ["0.2500", "0.6250", "+0.3750"]
    assert lines[2].endswith("[+0.1300, +0.6200]")  # 0.375 +- 1.96 * 0.1768 / sqrt(2)
    assert lines[-1].endswith("[+0.0000, +0.0000]")


def test_markdown_table():
    assert markdown_table([["", "base"], ["match", "0.5"]]).splitlines() == [
        "|       | base |",
        "| ----- | ---: |",
        "| match |  0.5 |",
    ]


def test_tensorboard_shows_the_gif(tmp_path):
    gif = gif_bytes(video_images(torch.rand(3, 3, 8, 8)), 16)
    with SummaryWriter(tmp_path) as writer:
        log_gif(writer, gif, (8, 8), step=7)
    events = EventAccumulator(str(tmp_path)).Reload().Images("held-out/videos")
    assert [(event.step, event.encoded_image_string) for event in events] == [(7, gif)]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.7, "1:00"), (61, "1:01"), (3661, "1:01:01")])
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_memory_is_the_systems_figure():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    expected = int(status["VmHWM"].split()[0]) * 1024 / 1e9
    assert peak_memory_gb(torch.device("cpu")) == pytest.approx(expected, rel=0.05)
