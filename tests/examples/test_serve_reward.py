"""The server as it is started, by a run that trains with it."""

import contextlib
import json
import signal
import socket
import sys
from pathlib import Path

import pytest
import requests
import torch

from tests.processes import Script
from tests.training.helpers import tiny_arguments


ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "examples"))
import serve_reward  # noqa: E402
import train_nft  # noqa: E402


@pytest.fixture
def server():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = Script("examples/serve_reward.py", "--rewards", "sharpness,dynamic_degree", "--port", port)
    url = f"http://127.0.0.1:{port}"
    first = f"sharpness, dynamic_degree at {url}\n"
    process.wait_for(first)

    def answers():
        with contextlib.suppress(requests.ConnectionError):
            return requests.get(f"{url}/health", timeout=5).json() == {"status": "ok"}

    process.wait_for(answers)
    yield url
    process.send_signal(signal.SIGINT)
    assert process.finish(timeout=20) == (130, first)  # and nothing else, no error


def test_a_run_trains_with_it(server, model_folder, tmp_path):
    arguments = tiny_arguments(
        model_folder,
        tmp_path,
        rewards="sharpness=1,tests.training.rewards:brightness=0.5",
        eval_rewards="dynamic_degree",
        reward_placement=f"sharpness={server},dynamic_degree={server}",
        max_train_steps=1,
    )
    assert train_nft.main(arguments) == 0
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["reward"] == pytest.approx(
        metrics[0]["sharpness"] + 0.5 * metrics[0]["tests.training.rewards:brightness"]
    )
    text = requests.get(f"{server}/metrics").text
    assert 'astrolabe_reward_responses_total{status="200"}' in text
    assert "astrolabe_reward_seconds_total" in text


def test_mistakes_are_one_line(capsys, monkeypatch):
    monkeypatch.delenv("ASTROLABE_REWARD_TOKEN", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = str(taken.getsockname()[1])
        check_mistakes(capsys, [(["--rewards", "sharpness", "--port", busy], "cannot listen at 127.0.0.1:")])
    mistakes = [
        ([], "error: rewards is empty: name at least one to serve."),
        (["--rewards", "sharpnes"], "error: rewards: unknown reward 'sharpnes'"),
        (["--rewards", "sharpness", "--host", "0.0.0.0"], "can be reached from elsewhere: set ASTROLABE_REWARD_TOKEN"),
        (["--rewrds", "sharpness"], "unknown argument --rewrds (did you mean --rewards"),
        (
            ["--rewards", "sharpness", "--cache_size", "9"],
            "there is no --cache_size any more: scores are computed anew",
        ),
        (
            ["--rewards", "sharpness", "--port", "99999999"],
            "error: port must be at least 1 and at most 65535, not 99999999.",
        ),
        (["--rewards", "sharpness", "--host", "no such host"], "error: server: there is no address 'no such host'"),
        (
            ["--rewards", "dynamic_degree", "--reward_options", "dynamic_degree.fps=abc"],
            "'fps' of reward 'dynamic_deg",
        ),
        (["--rewards", "sharpness", "--max_waiting_mb", "2047"], "max_waiting_mb=2047 is less than one request may"),
        (["--rewards", "sharpness", "--max_connections", "100000000"], "need 100000256 open files, and this process"),
    ]
    if not torch.cuda.is_available():
        mistakes.append((["--rewards", "sharpness", "--device", "cuda:1"], "rewards: there is no device 'cuda:1'"))
    check_mistakes(capsys, mistakes)
    monkeypatch.setenv("ASTROLABE_REWARD_TOKEN", "two\nlines")
    check_mistakes(
        capsys, [(["--rewards", "sharpness"], "server: ASTROLABE_REWARD_TOKEN holds a blank, a line break")]
    )


def check_mistakes(capsys, mistakes):
    for arguments, words in mistakes:
        assert serve_reward.main(arguments) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
