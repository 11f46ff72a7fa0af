"""The model of sessions: what it takes from viewers, and what it cannot make."""

import math

import pytest
import torch
from peft import LoraConfig

from astrolabe_diffusers.live.model import LiveModel
from astrolabe_diffusers.live.session import LiveSession
from tests.live.helpers import ENDLESS, lora, make_model, prompt
from tests.pipelines.test_scenes import A, B
from tests.tiny_pipeline import tiny_pipeline


def test_a_thousand_weights_do_not_look_at_every_layer(model, monkeypatch):
    """Which takes 33 ms for each in a model of 1.3B."""
    walks, modules = [], torch.nn.Module.modules
    monkeypatch.setattr(torch.nn.Module, "modules", lambda self: walks.append(self) or modules(self))
    session = LiveSession(model, A, 0, events=[{**lora(first=0.5), "block": 3}] * 1000)
    for _ in range(1000):
        session.send(lora(first=0.3))
    assert len(walks) < 10
    assert list(model.pipe.transformer.modules()) and walks  # it is what is counted


def test_a_dora_has_one_weight():
    pipe = tiny_pipeline(**ENDLESS)
    config = LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False, use_dora=True)
    pipe.transformer.add_adapter(config, "lora_0")
    model = LiveModel(pipe, "tiny", {"mine": 1.0})
    session = LiveSession(model, A, 0)
    session.send(lora(mine=1))
    for call in (
        lambda: session.send(lora(mine=0.5)),
        lambda: LiveSession(model, A, 0, compare=True),
        lambda: LiveSession(model, A, 0, events=[{**lora(mine=0), "block": 1}]),
    ):
        with pytest.raises(ValueError, match="^mine is a DoRA, which can only be applied with weight 1.$"):
            call()


def test_a_model_makes_no_longer_videos_than_it_has_positions():
    config = {"rope_mode": "absolute", "rope_max_seq_len": 9}
    assert make_model(config=config, num_frames=33).num_frames == 33
    with pytest.raises(ValueError, match="`num_frames=45` passes the model's 9 absolute positions: at most 33 frames"):
        make_model(config=config, num_frames=45)


@pytest.mark.parametrize(
    "event,message",
    [
        ({}, "type is one of prompt, lora"),
        ({"type": []}, "type is one of prompt, lora"),
        ([], "type is one of prompt, lora"),
        (prompt(None), "prompt must be text"),
        (prompt(B, transition="fade"), "must be one of .*roll.*recache.*cut"),
        (prompt(B, transition=[]), "must be one of .*roll.*recache.*cut"),
        (prompt(B, num_blocks=0), "num_blocks must be a whole number from 1 to 32"),
        (prompt(B, num_blocks=10**30), "num_blocks must be a whole number from 1 to 32"),
        (prompt(B, num_blocks=2, transition="cut"), "more than 1 only with transition='roll'"),
        ({"type": "lora"}, "weights must be an object"),
        (lora(), "weights must be an object"),
        (lora(firts=1.0), r"no LoRA 'firts' \(did you mean first\?\); there are first, second"),
        (lora(first="1"), "a number from -100 to 100"),
        (lora(first=math.nan), "a number from -100 to 100"),
        (lora(first=10**400), "a number from -100 to 100"),
        ({**prompt(B), "id": "7"}, "id must be a whole number from 0"),
    ],
)
def test_events_that_cannot_be(model, event, message):
    session = LiveSession(model, A, 0)
    with pytest.raises(ValueError, match=message):
        session.send(event)
    assert session.make_block()[1] == []
