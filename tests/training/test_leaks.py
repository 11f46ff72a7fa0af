"""What runs write, searched for what is no one else's business."""

import shutil
import socket
import sys
from pathlib import Path

import pytest
import wandb

from astrolabe_diffusers.rewards.placement.local import LocalRewards
from astrolabe_diffusers.rewards.placement.server import create_app
from tests.rewards.http_server import serving
from tests.training.helpers import ALL_REPORTS, BRIGHTNESS, tiny_arguments


sys.path.append(str(Path(__file__).parents[2] / "examples"))
import evaluate  # noqa: E402
import generate  # noqa: E402
import score  # noqa: E402
import train_nft  # noqa: E402


HOST = "rewards.planted.example"
TOKENS = {"HF_TOKEN": "hf_planted", "ASTROLABE_REWARD_TOKEN": "token_planted", "WANDB_API_KEY": "f00d" * 10}
JUDGED = "tests.training.test_leaks:judged"


def judged(videos, prompts, metadata, base_url="", weights="", command="", key_variable=""):
    return videos.mean(dim=(1, 2, 3, 4)), {}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder of a name that can be searched for, the working directory, and a server of that name."""
    home = tmp_path / "planted-home"
    home.mkdir()
    monkeypatch.chdir(home)
    resolve = socket.getaddrinfo
    here = {HOST: "127.0.0.1"}
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **kw: resolve(here.get(host, host), *rest, **kw))
    for name, value in {**TOKENS, "HOME": str(home), "WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    return home


def test_what_runs_write_names_no_secret_no_server_and_no_home(home, model_folder, monkeypatch):
    model = home / "models" / "tiny"
    shutil.copytree(model_folder, model)
    with serving(create_app(LocalRewards(["flicker"]), TOKENS["ASTROLABE_REWARD_TOKEN"])) as url:
        places = {"reward_placement": f"flicker={url.replace('127.0.0.1', HOST)}"}
        options = f"{JUDGED}.base_url=http://{HOST}:1/v1,{JUDGED}.weights={model},"
        places["reward_options"] = options + f"{JUDGED}.command=python {home}/judge.py,{JUDGED}.key_variable=HF_TOKEN"
        rewards = f"{BRIGHTNESS}=1,{JUDGED}=0,flicker=0"

        run = home / "runs" / "my-lora"
        values = {"rewards": rewards, "prompts": model / "prompts", **places}
        values |= {"max_train_steps": 1, "num_frames": 9, "report_to": "all"}
        arguments = tiny_arguments(model, run, **ALL_REPORTS | values)
        monkeypatch.setattr(sys, "argv", [f"{home}/train.py", *arguments])  # wandb would keep it
        assert train_nft.main(arguments) == 0
        wandb.teardown()  # as at the end of a process: its service has written everything

        second = home / "runs" / "second"
        assert train_nft.main(tiny_arguments(model, second, max_train_steps=1, num_frames=9, init_lora=run)) == 0

        size = ["--height", "16", "--width", "32", "--num_frames", "9"]
        names = ["--rewards", f"{BRIGHTNESS},{JUDGED},flicker", "--num_prompts", "1", "--seeds", "1"]
        names += [part for name, value in places.items() for part in (f"--{name}", value)]
        loras = ["--lora", f"mine={run}", "--lora", str(second), "--model", str(model)]
        assert evaluate.main([*loras, *size, *names, "--output_dir", str(home / "eval")]) == 0

        loras = ["--lora", f"{run}=0.5", f"{home}/runs/my-lora/checkpoints/checkpoint-1"]
        videos = ["--prompt", "a red circle", "--model", str(model), "--output_dir", str(home / "videos")]
        assert generate.main([*videos, *loras, *size, "--reward", BRIGHTNESS]) == 0

        arguments = ["--reward", rewards, "--output", str(home / "scores" / "all.json")]
        (home / "scores").mkdir()
        arguments += [part for name, value in places.items() for part in (f"--{name}", value)]
        assert score.main([str(home / "videos"), *arguments]) == 0

    planted = {str(home): "home", home.name: "home", HOST: "server", **dict.fromkeys(TOKENS.values(), "secret")}
    written = [path for path in home.rglob("*") if path.is_file() and model not in path.parents]
    assert {"README.md", "results.json", "manifest.jsonl", "all.json", "table.md"} <= {path.name for path in written}
    assert any(path.suffix == ".wandb" for path in written) and any("tfevents" in path.name for path in written)
    found = {}
    for path in written:
        for text, kind in planted.items():
            if text.encode() in path.read_bytes():
                found.setdefault(kind, set()).add(str(path.relative_to(home)))
    assert "secret" not in found, found
    # What resuming needs, and what wandb's client says of its own work: neither is uploaded.
    stays = {"config.yaml", "debug.log"}
    leaks = {(kind, path) for kind, paths in found.items() for path in paths if Path(path).name not in stays}
    assert not leaks
