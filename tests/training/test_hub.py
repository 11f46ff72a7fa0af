from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError

from astrolabe_diffusers.training import hub
from astrolabe_diffusers.training.errors import UserError
from tests.training.helpers import config


@pytest.fixture
def uploads(monkeypatch):
    """The Hub's three calls, replaced by a list of what would be uploaded."""
    calls = []

    def not_there(*args, **kwargs):
        raise EntryNotFoundError("no card yet")

    monkeypatch.setattr(ModelCard, "load", not_there)
    monkeypatch.setattr(hub, "create_repo", lambda name, **kwargs: SimpleNamespace(repo_id=f"someone/{name}"))
    monkeypatch.setattr(hub, "upload_folder", lambda **kwargs: calls.append(kwargs))
    return calls


def test_adapter_and_card_are_uploaded_and_checkpoints_are_not(tmp_path, uploads):
    cfg = config(output_dir=tmp_path / "my-lora", hub_token="secret")
    (tmp_path / "my-lora").mkdir()
    repo_id = hub.create_hub_repo(cfg)
    assert repo_id == "someone/my-lora"
    hub.push_to_hub(cfg, repo_id, table="reward 0.1 0.9")
    (upload,) = uploads
    assert upload["repo_id"] == repo_id and upload["token"] == "secret"
    assert "pytorch_lora_weights.safetensors" in upload["allow_patterns"]
    assert not any("checkpoint" in pattern for pattern in upload["allow_patterns"])
    card = (tmp_path / "my-lora" / "README.md").read_text()
    for text in ("reward 0.1 0.9", 'load_lora_weights("someone/my-lora")', "library_name: diffusers", "text-to-video"):
        assert text in card
    assert "secret" not in card


def test_repository_that_cannot_be_made_is_one_line(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("401\nwho are you?")

    monkeypatch.setattr(hub, "create_repo", refuse)
    with pytest.raises(UserError, match="push_to_hub: cannot create mine: 401 who are you"):
        hub.create_hub_repo(config(hub_model_id="mine"))
