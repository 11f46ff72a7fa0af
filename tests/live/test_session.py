"""Sessions: what is asked for holds from the next block on, is written down, and comes again bit for bit."""

import gc
import json
import math
import threading
import weakref
from dataclasses import replace
from functools import partial

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from diffusers.utils import load_image
from PIL import Image

from astrolabe_diffusers.live import session as session_module
from astrolabe_diffusers.live.model import LiveModel
from astrolabe_diffusers.live.session import LiveSession, replay
from astrolabe_diffusers.live.start_file import StartFile
from astrolabe_diffusers.models.kv_cache import CausalWanKVCache
from astrolabe_diffusers.models.lora_layers import lora_weights_of, tuner_layers
from astrolabe_diffusers.pipelines.loading import load_loras
from tests.live.files import picture_file, video_file
from tests.live.helpers import ENDLESS, all_equal, lora, make_blocks, make_model, prompt, steered
from tests.pipelines.test_scenes import A, B, C
from tests.tiny_pipeline import tiny_pipeline
from tests.two_experts import two_expert_pipeline


def reference(model, changes, number=6, seed=0, weights=(1.0, 0.0)):
    """Blocks of the pipeline's own stream, whose adapters diffusers sets between blocks, and whose passes all compute
    the keys and values of their text anew. `changes` are functions of the stream, by block."""
    pipe = model.pipe
    names = list(model.adapters.values())
    before = list(model.weights.values())
    forget = CausalWanKVCache.set_text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CausalWanKVCache, "set_text", lambda self, text: forget(self, None))
        pipe.set_adapters(names, list(weights))
        blocks = []
        with pipe.stream(
            A, num_frames=math.inf, generator=torch.Generator().manual_seed(seed), output_type="uint8"
        ) as stream:
            for block in range(number):
                changes.get(block, lambda stream: None)(stream)
                blocks.append(next(stream)[0])
        pipe.set_adapters(names, before)
    return blocks


@pytest.mark.parametrize("transition", ["roll", "recache", "flush", "rope_cut", "cut"])
def test_a_prompt_holds_from_the_next_block_on(model, transition):
    session = LiveSession(model, A, 0)
    blocks = make_blocks(session, 2)
    session.send(prompt(B, transition=transition))
    (block,), (mark,) = session.make_block()
    assert (mark.block, mark.sent_after_block, mark.event["prompt"]) == (2, 1, B)
    assert mark.seconds >= block.seconds > 0
    blocks += [torch.from_numpy(block.frames), *make_blocks(session, 3)]
    assert all_equal(blocks, reference(model, {2: lambda stream: stream.set_prompt(B, transition)}))
    assert not torch.equal(blocks[2], reference(model, {}, 3)[2])


@pytest.mark.parametrize("weights", [(0.5, 0.0), (0.0, 0.0), (0.3, 1.5)])
def test_a_lora_weight_is_that_of_a_stream_with_fresh_text_keys(model, weights):
    session = LiveSession(model, A, 0)
    blocks = make_blocks(session, 3)
    session.send(lora(first=weights[0], second=weights[1]))
    blocks += make_blocks(session, 3)
    names = list(model.adapters.values())
    wanted = reference(model, {3: lambda stream: model.pipe.set_adapters(names, list(weights))})
    assert all_equal(blocks, wanted)
    assert (blocks[3].int() - reference(model, {}, 4)[3].int()).abs().max() > 3


def test_loras_of_two_experts(tmp_path):
    """One of each: the weight holds in the expert that has it, from the next block on."""
    pipe = two_expert_pipeline(**ENDLESS)
    a, b = 0.4 * torch.randn(2, 4, 24, generator=torch.Generator().manual_seed(0))
    layers = {"blocks.0.attn1.to_k.lora_A.weight": a, "blocks.0.attn1.to_k.lora_B.weight": b.T.contiguous()}
    loras = {str(tmp_path / name): 1.0 for name in pipe.experts}
    for name, path in zip(pipe.experts, loras):
        pipe.save_lora_weights(path, **{f"{name}_lora_layers": layers})
    load_loras(pipe, loras)
    model = LiveModel(pipe, "tiny", loras)
    assert len(set(model.lora_digests.values())) == 2
    for name, weights in zip(model.adapters, ((0.0, 1.0), (1.0, 0.0))):
        session = LiveSession(model, A, 0)
        blocks = make_blocks(session, 2)
        session.send(lora(**{name: 0.0}))
        blocks += make_blocks(session, 3)
        plain = reference(model, {}, 5, weights=(1.0, 1.0))
        change = partial(pipe.set_adapters, ["lora_0", "lora_1"], list(weights))
        changed = reference(model, {2: lambda _, change=change: change()}, 5, weights=(1.0, 1.0))
        assert all_equal(blocks, changed) and not torch.equal(blocks[3], plain[3])


def test_sessions_of_other_strengths_do_not_touch(model):
    """Blocks in turns are those of each alone, and the pipeline is as it was after each."""

    def sessions():
        first, second = LiveSession(model, A, 0), LiveSession(model, A, 0)
        second.send(lora(first=0.2, second=0.7))
        return first, second

    alone = []
    for session in sessions():
        alone.append(make_blocks(session, 5))
    assert (alone[0][0].int() - alone[1][0].int()).abs().max() > 3
    before = lora_weights_of(tuner_layers(model.pipe.transformer))
    mixed = [[], []]
    pair = sessions()
    for turn in (0, 1, 1, 0, 1, 0, 0, 1, 0, 1):
        mixed[turn] += make_blocks(pair[turn], 1)
        assert lora_weights_of(tuner_layers(model.pipe.transformer)) == before
    assert all_equal(mixed[0], alone[0]) and all_equal(mixed[1], alone[1])


def test_lanes_are_the_base_and_the_loras(model):
    session = LiveSession(model, A, 0, compare=True)
    lanes = [session.make_block() for _ in range(3)]
    session.send(prompt(B))
    lanes += [session.make_block() for _ in range(2)]
    base, tuned = ([torch.from_numpy(blocks[lane].frames) for blocks, _ in lanes] for lane in (0, 1))
    plain = LiveSession(LiveModel(tiny_pipeline(**ENDLESS), "tiny"), A, 0)
    wanted = make_blocks(plain, 3)
    plain.send(prompt(B))
    assert all_equal(base, wanted + make_blocks(plain, 2))
    assert all_equal(tuned, reference(model, {3: lambda stream: stream.set_prompt(B)}, 5))


def test_a_replay_can_be_steered_on(model):
    session, blocks = steered(model)
    record = session.record()
    second = LiveSession(model, record["prompt"], record["seed"], events=record["events"])
    made = [second.make_block() for _ in range(9)]
    assert all(np.array_equal(a[0].frames, b[0].frames) for a, (b, _) in zip(blocks, made))
    assert [(mark.block, mark.id) for _, marks in made for mark in marks] == [(i, None) for i in (0, 1, 3, 5, 7)]
    second.send(prompt(B))
    second.make_block()
    assert second.record()["events"] == [*record["events"], {"block": 9, **second.record()["events"][-1]}]


def test_of_several_prompts_the_last_counts_and_weights_add_up(model):
    session = LiveSession(model, A, 0)
    session.make_block()
    for id, event in enumerate((prompt(C), lora(first=0.2), prompt(B), lora(second=0.9), lora(first=0.5))):
        session.send({**event, "id": id})
    _, marks = session.make_block()
    assert [mark.id for mark in marks] == [2, 4]
    assert [mark.event for mark in marks] == [
        prompt(B, transition="roll", num_blocks=1), lora(first=0.5, second=0.9),
    ]  # fmt: skip
    assert session.record()["events"] == [
        {"block": 0, **lora(first=1.0, second=0.0)},
        {"block": 1, **lora(first=0.5, second=0.9)},
        {"block": 1, **prompt(B, transition="roll", num_blocks=1)},
    ]


def test_a_model_that_cannot_go_on_has_an_end():
    for overrides, number in (({"rope_mode": "absolute"}, 2), ({"local_attn_size": -1}, 2)):
        pipe = tiny_pipeline(**{**ENDLESS, **overrides})
        session = LiveSession(LiveModel(pipe, "tiny"), A, 0)
        wanted = pipe(A, generator=torch.Generator().manual_seed(0), output_type="uint8").frames[0]
        assert torch.equal(torch.cat(make_blocks(session, number)), wanted)
        with pytest.raises(StopIteration):
            session.make_block()
        assert session.record()["num_frames"] == len(wanted) == 21
        with pytest.raises(ValueError, match="it has 3 blocks, and its video only 2"):
            list(replay(session.model, {**session.record(), "num_blocks": 3}))


# What a video starts from


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """A file of 25 frames, which are no whole number of blocks, and its frames as ffmpeg gives them."""
    path = video_file(tmp_path_factory.mktemp("start") / "video.mp4")
    return StartFile.read(path.read_bytes()), [Image.fromarray(frame) for frame in iio.imread(path, plugin="FFMPEG")]


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("start") / "picture.png"
    path.write_bytes(picture_file())
    return StartFile.read(path.read_bytes()), load_image(str(path))


def stream(model, number, **start):
    """Blocks of the pipeline's own stream, with the weights that were loaded."""
    if model.adapters:
        model.pipe.set_adapters(list(model.adapters.values()), list(model.weights.values()))
    generator = torch.Generator().manual_seed(3)
    settings = {"num_frames": model.num_frames} if "strength" not in start else {}
    with model.pipe.stream(A, generator=generator, output_type="uint8", **settings, **start) as stream:
        return [next(stream)[0] for _ in range(number)]


def test_a_video_goes_on_from_the_file(model, video):
    """It has its first 21 frames, in the pipeline's size, whatever size they are sent in."""
    file, frames = video
    session = LiveSession(model, A, 3, start_file=file)
    blocks = make_blocks(session, 4)
    assert all_equal(blocks, stream(model, 4, video=frames[:21]))
    assert not torch.equal(blocks[2], make_blocks(LiveSession(model, A, 3), 3)[2])


def test_a_picture_is_the_first_block_of_a_model_with_blocks_of_one(picture):
    file, image = picture
    model = make_model(config={"num_frames_per_block": 1})
    assert "image/png" in model.start_media
    blocks = make_blocks(LiveSession(model, A, 3, start_file=file), 4)
    assert [len(block) for block in blocks] == [1, 4, 4, 4]
    assert all_equal(blocks, stream(model, 4, image=image))
    assert not torch.equal(blocks[1], make_blocks(LiveSession(model, A, 3), 2)[1])


def test_with_a_strength_the_video_is_made_anew(model, video):
    file, frames = video
    session = LiveSession(model, A, 3, start_file=file, strength=0.6)
    blocks = make_blocks(session, 2)
    assert all_equal(blocks, stream(model, 2, video=frames[:21], strength=0.6))
    with pytest.raises(StopIteration):
        session.make_block()
    other = make_blocks(LiveSession(model, A, 3, start_file=file, strength=0.9), 2)
    assert not torch.equal(blocks[0], other[0])
    repeated = [torch.from_numpy(lanes[0].frames) for lanes in replay(model, json.loads(json.dumps(session.record())))]
    assert all_equal(repeated, blocks)


def test_a_saved_session_has_what_it_started_from(model, lora_paths, video):
    """Both lanes start from it, and begin alike."""
    file, frames = video
    session, blocks = steered(model, compare=True, start_file=file)
    assert np.array_equal(blocks[0][0].frames, stream(model, 1, video=frames[:21])[0])
    assert np.array_equal(blocks[0][0].frames, blocks[0][1].frames)
    assert not np.array_equal(blocks[2][0].frames, blocks[2][1].frames)
    record = json.loads(json.dumps(session.record()))
    again = make_model(dict(zip(lora_paths, (1.0, 0.0))))
    for old, new in zip(blocks, replay(again, record), strict=True):
        assert all(np.array_equal(a.frames, b.frames) for a, b in zip(old, new, strict=True))
    # Of one that started from nothing there is nothing.
    assert LiveSession(model, A, 0).record()["start_frames"] is None


def test_frames_are_let_go_when_they_are_encoded(model, video):
    for use in (LiveSession.make_block, LiveSession.close):
        session = LiveSession(model, A, 0, start_file=video[0])
        frame = weakref.ref(session._start["video"][0])
        use(session)
        gc.collect()
        assert frame() is None


def test_starts_that_cannot_be(model, video, picture):
    """With every number of frames that a video may have, none of them a whole block too many."""
    (video, _), (picture, _) = video, picture
    assert model.start_media == ["video/quicktime", "video/mp4", "video/webm"]
    for values, message in (
        ({"start_file": picture}, "a picture is one frame, but the first block of this model has 9"),
        ({"start_file": replace(video, num_frames=8)}, "has 9 frames, and of the file's 8 only 8 can be given"),
        ({"strength": 0.5}, "needs a video to start from"),
        *(({"start_file": video, "strength": s}, "above 0 and at most 1") for s in (0, 1.1, math.nan, True, "1", [])),
    ):
        with pytest.raises(ValueError, match=message):
            LiveSession(model, A, 0, **values)
    short = LiveModel(tiny_pipeline(**{**ENDLESS, "rope_mode": "absolute"}), "tiny")
    assert short.num_frames == 21
    assert (short.num_start_frames(video), short.num_start_frames(video, 0.5)) == (9, 21)
    assert len(torch.cat(make_blocks(LiveSession(short, A, 0, start_file=video), 2))) == 21
    for number in range(9, 26):
        assert model.num_start_frames(replace(video, num_frames=number)) == (9 if number < 21 else 21)
    record = LiveSession(model, A, 0).record()
    with pytest.raises(ValueError, match="start_frames must be a data URI"):
        next(replay(model, {**record, "num_blocks": 1, "start_frames": "video.mp4"}))


# What a viewer gets wrong


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"prompt": 5}, "prompt must be text"),
        ({"prompt": "a" * 5000}, "at most 4096 characters"),
        ({"prompt": "|".join("a" * 33)}, "at most 32 scenes"),
        ({"prompt": "a [red] car"}, "character 3"),
        ({"seed": -1}, "seed must be a whole number from 0 to"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"seed": True}, "seed must be a whole number"),
        ({"height": 17}, "`height` must be a multiple of 16"),
        ({"height": "16"}, "`height` must be a multiple of 16"),
        ({"height": 1600}, "1600x32 are more than 512 pixels"),
        ({"width": 16 * 10**400}, "are more than 512 pixels"),
        ({"compare": 1}, "compare must be true or false"),
        ({"events": {}}, "events must be a list"),
        ({"events": [5]}, "an event is an object whose type is one of prompt, lora"),
        ({"events": [{"type": "lora", "weights": {"first": 1}}]}, "block of an event must be a whole number"),
    ],
)
def test_sessions_that_cannot_be(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        LiveSession(model, **{"prompt": A, "seed": 0, **arguments})


@pytest.mark.parametrize("bound,value", [("MAX_EVENTS", 5), ("MAX_EVENT_BYTES", 300)])
def test_a_session_has_no_more_changes_than_can_be_replayed(model, monkeypatch, bound, value):
    monkeypatch.setattr(session_module, bound, value)
    session, sent = LiveSession(model, A, 0), 0
    with pytest.raises(ValueError, match="this video has had as many changes as can be saved: restart it"):
        for number in range(10):
            session.send(lora(first=0.1 * number))
            session.make_block()
            sent += 1
    assert 2 <= sent < 9
    record = session.record()
    assert record["num_blocks"] == sent
    session.close()
    assert len(list(replay(model, record))) == sent
    again = LiveSession(model, A, 0, events=record["events"])
    with pytest.raises(ValueError, match="as many changes"):
        for _ in range(sent + 1):
            again.send(lora(first=0.5))
            again.make_block()
    again.close()


def test_of_changes_before_one_block_only_the_last_counts_as_one(model, monkeypatch):
    monkeypatch.setattr(session_module, "MAX_EVENTS", 5)
    session = LiveSession(model, A, 0)
    for _ in range(20):
        session.send(lora(first=0.5))
        session.send(prompt(B))
    session.make_block()
    session.close()
    assert [event["type"] for event in session.record()["events"]] == ["lora", "prompt"]


def test_a_side_that_no_codec_has():
    model = make_model(max_pixels=2**30)
    LiveSession(model, A, 0, height=16, width=16_368)
    for size in ({"width": 16_384}, {"height": 17_600, "width": 16}):
        with pytest.raises(ValueError, match="height and width must be at most 16383, not"):
            LiveSession(model, A, 0, **size)


def test_without_a_lora_there_is_none_to_compare():
    with pytest.raises(ValueError, match="only with a LoRA"):
        LiveSession(make_model(), A, 0, compare=True)
    with pytest.raises(ValueError, match="no LoRA 'first'; none is loaded"):
        LiveSession(make_model(), A, 0).send(lora(first=1.0))


def test_it_is_steered_from_any_thread(model):
    session = LiveSession(model, A, 0)
    stop = threading.Event()

    def steer():
        while not stop.is_set():
            session.send(lora(first=0.5))
            session.send(prompt(B))
            session.show(session.num_frames - 1) if session.num_frames else None

    threads = [threading.Thread(target=steer) for _ in range(3)]
    for thread in threads:
        thread.start()
    blocks = make_blocks(session, 8)
    stop.set()
    for thread in threads:
        thread.join()
    record = session.record()
    repeated = [torch.from_numpy(lanes[0].frames) for lanes in replay(model, record)]
    assert all_equal(blocks, repeated)
