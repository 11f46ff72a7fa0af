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
from peft import LoraConfig
from PIL import Image

from astrolabe_diffusers.live import session as session_module
from astrolabe_diffusers.live.session import LiveModel, LiveSession, replay
from astrolabe_diffusers.live.start_file import StartFile
from astrolabe_diffusers.models.kv_cache import CausalWanKVCache
from astrolabe_diffusers.models.lora_layers import lora_weights_of, tuner_layers
from astrolabe_diffusers.pipelines.loading import load_loras
from tests.live.files import picture_file, video_file
from tests.live.helpers import ENDLESS, all_equal, make_blocks, make_model, save_loras
from tests.pipelines.test_scenes import A, B, C
from tests.tiny_pipeline import tiny_pipeline
from tests.two_experts import two_expert_pipeline


@pytest.fixture(scope="module")
def lora_paths(tmp_path_factory):
    return save_loras(tmp_path_factory.mktemp("loras"))


@pytest.fixture(scope="module")
def model(lora_paths):
    return make_model(dict(zip(lora_paths, (1.0, 0.0))))


def prompt(text, **values):
    return {"type": "prompt", "prompt": text, **values}


def lora(**weights):
    return {"type": "lora", "weights": weights}


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


def steered(model, **settings):
    """A session with every kind of change, and its frames."""
    session = LiveSession(model, A, 7, **settings)
    session.send(lora(second=0.4))
    blocks = [session.make_block()[0]]
    for event in (
        prompt(B, transition="recache"), lora(first=0.3), prompt(C, num_blocks=3), prompt(A, transition="cut"),
    ):  # fmt: skip
        session.send(event)
        blocks += [session.make_block()[0], session.make_block()[0]]
    return session, blocks


@pytest.mark.parametrize("compare", [False, True])
def test_a_saved_session_is_the_same_again(model, lora_paths, compare):
    session, blocks = steered(model, compare=compare)
    record = json.loads(json.dumps(session.record()))
    assert record["num_blocks"] == 9
    assert [event["block"] for event in record["events"]] == [0, 1, 3, 5, 7]
    # Loaded anew, and in another order.
    again = make_model(dict(zip(lora_paths[::-1], (1.0, 1.0))))
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


# The flow, by a clock of ours


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(session_module, "time", clock)
    return clock


def test_one_block_at_most_is_made_beyond_the_one_that_is_shown(model, clock):
    session = LiveSession(model, A, 0)
    assert session.due_at(0.1) <= clock.now
    session.make_block()  # frames 0 to 8
    assert session.due_at(0.1) <= clock.now
    session.make_block()  # 9 to 20
    assert session.due_at(0.1) == math.inf
    session.show(7)
    assert session.due_at(0.1) == math.inf
    session.show(8)
    assert session.due_at(0.1) < math.inf
    session.make_block()
    clock.now += 1000
    assert session.due_at(0.1) == math.inf


def test_a_block_is_made_as_late_as_is_in_time(model, clock):
    session = LiveSession(model, A, 0)
    session.make_block(), session.make_block()
    rate = model.frame_rate
    for frame in range(9):
        session.show(frame)
        clock.now += 1 / rate
    # Twelve frames are left, counted from when the last report came.
    left = clock.now - 1 / rate + 12 / rate
    early = [left - session.due_at(seconds) for seconds in (0.0, 0.1, 0.2)]
    assert 0.1 < early[0] < 0.2
    assert early[1] - early[0] == pytest.approx(0.15) and early[2] - early[1] == pytest.approx(0.15)
    session.show(14)  # reports may be left out
    assert session.due_at(0.1) == pytest.approx(clock.now + 6 / rate - early[1])


def test_the_first_block_waits_for_the_second_one(model):
    """It has 9 frames, and is shown in 9 / 16 s; the others have 12."""
    session = LiveSession(model, A, 0)
    session.make_block()
    assert session.start_delay(0.1) == session.start_delay(0.8) == 0  # fast enough; never fast enough
    delay = session.start_delay(0.5)
    assert 0 < delay < 0.5 < delay + 9 / model.frame_rate
    assert session.start_delay(0.5, 1.0) == pytest.approx(delay + 1.0)  # after first blocks of others


def test_the_only_block_waits_for_none():
    session = LiveSession(make_model(num_frames=9), A, 0)
    session.make_block()
    assert session.start_delay(0.5) == 0


def test_a_first_block_of_one_frame_waits_for_any_second_one():
    """It is shown in 1 / 16 s."""
    session = LiveSession(make_model(config={"num_frames_per_block": 1}), A, 0)
    session.make_block()
    assert session.start_delay(0.0) == pytest.approx(0.0875)


def test_a_warm_model_knows_how_long_a_block_takes(tmp_path):
    model = make_model(dict.fromkeys(save_loras(tmp_path / "loras"), 1.0))
    assert LiveSession(model, A, 0).block_seconds == 0
    model.warm_up()
    assert model.block_seconds > 0
    assert LiveSession(model, A, 0).block_seconds == model.block_seconds
    assert LiveSession(model, A, 0, compare=True).block_seconds == 2 * model.block_seconds


def test_what_a_session_has_measured_counts_alone():
    model = make_model()
    model.block_seconds = 100.0
    session = LiveSession(model, A, 0)
    session.make_block()  # the first one is not measured
    assert session.block_seconds == 100
    session.make_block()
    assert 0 < session.block_seconds < 50


@pytest.mark.parametrize("num_frames,seconds", [(9, 30.0), (21, 20.0), (33, 10.0), (None, 5.0)])
def test_a_warm_model_counts_the_last_block(monkeypatch, num_frames, seconds):
    """That which fills its window, or the last one where a video has fewer."""
    make = LiveSession.make_block

    def make_slowly(session):
        blocks, marks = make(session)
        blocks[0].seconds = (30.0, 20.0, 10.0, 5.0)[blocks[0].number]
        return blocks, marks

    monkeypatch.setattr(LiveSession, "make_block", make_slowly)
    model = make_model(num_frames=num_frames)
    model.warm_up()
    assert model.block_seconds == seconds


def test_a_warm_model_has_filled_its_window_and_taken_a_prompt(monkeypatch):
    made, make = [], LiveSession.make_block

    def count(session):
        blocks, marks = make(session)
        made.append([mark.event["type"] for mark in marks])
        return blocks, marks

    monkeypatch.setattr(LiveSession, "make_block", count)
    make_model(config={"local_attn_size": 12, "sink_size": 3, "rope_mode": "relative"}).warm_up()
    assert made == [[], ["prompt"], [], [], []]


def test_a_model_makes_no_longer_videos_than_it_has_positions():
    config = {"rope_mode": "absolute", "rope_max_seq_len": 9}
    assert make_model(config=config, num_frames=33).num_frames == 33
    with pytest.raises(ValueError, match="`num_frames=45` passes the model's 9 absolute positions: at most 33 frames"):
        make_model(config=config, num_frames=45)


def test_a_picture_that_stood_still_makes_blocks_come_earlier(model, clock):
    session = LiveSession(model, A, 0)
    session.make_block(), session.make_block()
    rate = model.frame_rate

    def show_up_to(frame, wait):
        """At the frame rate, but for the first one, which comes `wait` seconds late."""
        clock.now += wait
        for shown in range(session._shown + 1, frame + 1):
            clock.now += 1 / rate
            session.show(shown)

    show_up_to(8, 0.0)
    before = clock.now + 12 / rate - session.due_at(0.1)
    show_up_to(20, 0.3)
    session.make_block()
    assert clock.now + 12 / rate - session.due_at(0.1) == pytest.approx(before + 0.3)
    session.pause()
    assert session.due_at(0.1) == math.inf
    clock.now += 60
    session.pause(False)
    show_up_to(32, 5.0)  # while it was paused nothing was late
    session.make_block()
    assert clock.now + 12 / rate - session.due_at(0.1) <= before + 0.3
    for _ in range(40):  # it goes back when all is in time
        show_up_to(session.num_frames - 1, 0.0)
        session.make_block()
    assert clock.now + 12 / rate - session.due_at(0.1) == pytest.approx(before)


def test_a_picture_that_was_sent_late_makes_blocks_come_earlier(model, clock):
    """Before the picture stands still, and as much earlier as it was late, though it was shown late as well."""
    session = LiveSession(model, A, 0)
    session.make_block(), session.make_block()
    rate = model.frame_rate

    def lead():
        return session._shown_at + (session.num_frames - 1 - session._shown) / rate - session.due_at(0.1)

    for shown in range(9):
        session.show(shown)
        clock.now += 1 / rate
    before = lead()
    clock.now -= 0.06  # 60 ms before frame 9 is due, which is in time
    session.sent(9)
    assert lead() == pytest.approx(before)
    clock.now += 0.04
    session.sent(9)
    assert lead() == pytest.approx(before + 0.03)
    clock.now += 0.22
    session.sent(9)
    assert lead() == pytest.approx(before + 0.28)
    clock.now += 0.01
    session.show(9)
    assert before < lead() <= before + 0.28


def test_frames_of_a_video_before_are_not_this_ones(model):
    session = LiveSession(model, A, 0)
    session.make_block(), session.make_block()
    session.show(500)
    assert session.due_at(0.1) == math.inf


def test_recordings_that_are_behind_are_waited_for(model):
    session = LiveSession(model, A, 0)
    for recording in ("first", "second"):
        session.hold(recording, True)
    assert session.due_at(0.1) == math.inf
    session.hold("first", False)
    assert session.due_at(0.1) == math.inf
    session.hold("second", False)
    assert session.due_at(0.1) < math.inf


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
