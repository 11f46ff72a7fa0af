"""Records of sessions: they come again bit for bit, and those of other models are told apart."""

import json

import numpy as np
import pytest
import torch

from astrolabe_diffusers.live.model import LiveModel
from astrolabe_diffusers.live.session import LiveSession, replay
from tests.live.helpers import all_equal, lora, make_blocks, make_model, steered
from tests.pipelines.test_scenes import A


@pytest.mark.parametrize("compare", [False, True])
def test_a_saved_session_is_the_same_again(model, lora_paths, compare):
    session, blocks = steered(model, compare=compare)
    record = json.loads(json.dumps(session.record()))
    assert record["num_blocks"] == 9
    assert [event["block"] for event in record["events"]] == [0, 1, 3, 5, 7]
    # Loaded anew, and in another order.
    again = make_model(dict(zip(lora_paths[::-1], (1.0, 1.0))))
    # As it was: another sum would be another frame now and then.
    assert again.pipe.get_active_adapters() == [again.adapters[name] for name in ("first", "second")]
    repeated = list(replay(again, record))
    assert len(repeated) == len(blocks)
    for old, new in zip(blocks, repeated):
        assert [block.lane for block in new] == [block.lane for block in old]
        assert all(np.array_equal(a.frames, b.frames) for a, b in zip(old, new))


def test_a_lora_that_a_session_was_made_without_does_not_act(model, lora_paths):
    first = make_model({lora_paths[0]: 1.0})
    session, blocks = LiveSession(first, A, 7), []
    blocks += make_blocks(session, 2)
    session.send(lora(first=0.3))
    blocks += make_blocks(session, 2)
    both = make_model(dict(zip(lora_paths, (1.0, 1.0))))
    repeated = [torch.from_numpy(lanes[0].frames) for lanes in replay(both, session.record())]
    assert all_equal(repeated, blocks)
    assert not torch.equal(make_blocks(LiveSession(both, A, 7), 1)[0], blocks[0])


def test_sessions_of_others_are_told_apart(model, lora_paths):
    session = LiveSession(model, A, 0)
    session.make_block()
    record = session.record()

    def refuse(message, model=model, **values):
        with pytest.raises(ValueError, match=message):
            next(replay(model, {**record, **values}))

    refuse("other weights than those of tiny", weights="0" * 16)
    refuse("with the LoRA first: load that one", model=make_model())
    refuse("another release: its version is 2", version=2)
    refuse("made in bfloat16, not float32", dtype="bfloat16")
    refuse("with max_sequence_length 4, not 16: give that one", max_sequence_length=4)
    refuse("with vae_tiling True, not False", vae_tiling=True)
    refuse("with attention_backend flash, not None", attention_backend="flash")
    refuse("with compile True, not False", compile=True)
    refuse("loras must be an object", loras=["first"])
    refuse("another model: patch_size of its transformer is None, and here", configs=[])
    # Of the same weights.
    for component, values in (
        ("transformer", {"sink_size": 0}),
        ("transformer", {"local_attn_size": 6}),
        ("scheduler", {"shift": 3.0}),
        ("pipeline", {"sigmas": [1.0, 0.75]}),
    ):
        other = make_model(dict(zip(lora_paths, (1.0, 0.0))))
        owner = other.pipe if component == "pipeline" else getattr(other.pipe, component)
        owner.register_to_config(**values)
        other = LiveModel(other.pipe, "tiny", {str(path): 1.0 for path in lora_paths})
        (name,) = values
        assert other.digest == model.digest
        refuse(f"another model: {name} of its {component} is .*, and here", model=other)
    refuse("ends after 33 frames", num_frames=33)
    refuse("num_blocks must be a whole number", num_blocks=-1)
    with pytest.raises(ValueError, match="it is no session, which has events"):
        next(replay(model, []))
    # The base is told from one that was trained, with the same LoRAs.
    other = make_model(dict(zip(lora_paths, (1.0, 0.0))))
    next(other.pipe.transformer.parameters()).data.add_(1e-3)
    changed = LiveModel(other.pipe, "tiny", {str(path): 1.0 for path in lora_paths})
    refuse("other weights", model=changed)
    assert changed.lora_digests == model.lora_digests
