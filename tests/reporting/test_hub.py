"""Uploads to a stand-in for the Hub that runs on this machine."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants, hf_api

from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.reporting.hub import create_hub_repo, push_to_hub
from tests.training.helpers import ALL_REPORTS, config, tiny_arguments
from tests.training.hub_server import TOKEN, serve_hub


sys.path.append(str(Path(__file__).parents[2] / "examples"))
from train_nft import main  # noqa: E402


WEIGHTS = "pytorch_lora_weights.safetensors"
RESULTS = {"steps": 2}


@pytest.fixture
def hub(monkeypatch):
    """The stand-in, which this process takes for the Hub."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serve_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        # What huggingface_hub has made of it when it was imported.
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server


def finished_run(folder):
    """A folder with files as a run leaves them, and their contents."""
    files = {
        "README.md": "---\nlicense: mit\n---\n# mine",
        WEIGHTS: "weights",
        "rewards.png": "curve",
        "eval_videos/step-2/000.mp4": "video",
        "eval_videos/step-0/000.mp4": "old video",
        "checkpoints/checkpoint-2/" + WEIGHTS: "checkpoint",
        "config.yaml": "output_dir: /home/me",
        "results.json": "{}",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    public = ("README.md", WEIGHTS, "rewards.png", "eval_videos/step-2/000.mp4")
    return {name: files[name].encode() for name in public}


def test_a_run_that_is_pushed_loads_as_its_card_says(hub, model_folder, tmp_path, monkeypatch, capsys):
    """Training, upload and download; the code of the card is run to the letter."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    Path(model_folder.name).symlink_to(model_folder)
    values = ALL_REPORTS | {"num_frames": 9, "eval_steps": 2, "eval_seeds": 1, "checkpointing_steps": 2}
    values |= {"push_to_hub": True, "hub_license": "apache-2.0"}
    assert main(tiny_arguments(model_folder.name, "my-lora", **values)) == 0
    assert f"pushed to {hub.url}/someone/my-lora" in capsys.readouterr().out
    (code,) = re.findall("```python\n(.*?)```", Path("my-lora/README.md").read_text(), re.S)
    loaded = []
    for source in ("someone/my-lora", "my-lora"):
        scope = {}
        exec(code.replace("someone/my-lora", source), scope)
        parameters = scope["pipe"].transformer.named_parameters()
        loaded.append(sum(value.abs().sum().item() for name, value in parameters if "lora_" in name))
    assert loaded[0] == loaded[1] > 0 and Path("video.mp4").stat().st_size > 0
    assert list(Path("hf").rglob(WEIGHTS))

    repo = hub.repos["someone/my-lora"]
    assert hub.messages == ["2 steps of NFT"]
    assert {"README.md", WEIGHTS, "before_after.gif", "eval_videos/step-2/001.mp4"} <= repo.keys()
    assert not {"config.yaml", "results.json"} & repo.keys() and not any("checkpoint" in name for name in repo)
    for name, content in repo.items():
        assert content == (tmp_path / "my-lora" / name).read_bytes()
        assert str(tmp_path).encode() not in content and TOKEN.encode() not in content, name
    card = ModelCard(repo["README.md"].decode())
    assert card.data.license == "apache-2.0" and 'load_lora_weights("someone/my-lora")' in card.text
    # What the card shows is there.
    shown = re.findall(r"\]\((?!http)([^)]+)\)", card.text) + [widget["output"]["url"] for widget in card.data.widget]
    assert len(shown) >= 6 and set(shown) <= repo.keys()


def test_upload(hub, tmp_path):
    expected = finished_run(tmp_path / "mine")
    cfg = config(output_dir=tmp_path / "mine")
    repo_id = create_hub_repo(cfg)
    assert repo_id == create_hub_repo(cfg) == "someone/mine"
    assert push_to_hub(cfg, repo_id, RESULTS) == f"pushed to {hub.url}/someone/mine"
    assert hub.repos["someone/mine"] == expected


def test_a_hub_that_fails_at_the_end_costs_a_command(hub, tmp_path):
    expected = finished_run(tmp_path / "my run")
    cfg = config(output_dir=tmp_path / "my run", hub_model_id="mine")
    repo_id = create_hub_repo(cfg)
    hub.broken = True
    line = push_to_hub(cfg, repo_id, RESULTS)
    assert "not pushed to someone/mine" in line and "being repaired" in line and "\n" not in line
    assert TOKEN not in line and not hub.repos["someone/mine"]
    hub.broken = False
    command = line.split("Later: ")[1]
    assert command.startswith("hf upload ")
    # The `hf` of this Python.
    hf = f'hf() {{ {sys.executable} -c "from huggingface_hub.cli.hf import main; main()" "$@"; }}'
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    subprocess.run(["bash", "-c", f"{hf}; {command}"], cwd=tmp_path, env=env, check=True)
    assert hub.repos["someone/mine"] == expected


def test_a_card_that_the_hub_refuses(hub, tmp_path):
    finished_run(tmp_path / "mine")
    (tmp_path / "mine" / "README.md").write_text("---\nbase_model: /home/me/model\n---\n")
    cfg = config(output_dir=tmp_path / "mine")
    line = push_to_hub(cfg, create_hub_repo(cfg), RESULTS)
    assert "not pushed" in line and '"base_model" must be a valid model id' in line


@pytest.mark.parametrize("reason", ["Invalid username or password", "refused|connect"])
def test_repository_that_cannot_be_made_is_one_line(hub, tmp_path, monkeypatch, reason):
    """Before training: with a wrong token, or without a connection."""
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    if "refused" in reason:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="(?i)push_to_hub: cannot create mine: .*" + f"({reason})") as error:
        create_hub_repo(config(hub_model_id="mine"))
    assert "\n" not in str(error.value)
