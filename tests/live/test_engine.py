"""The thread that makes blocks: whose turn it is, who waits, and what is left of those who go."""

import gc
import math
import threading
import time
import weakref
from contextlib import contextmanager

import numpy as np
import pytest

from astrolabe_diffusers.live.engine import Ended, FullError, LiveEngine, Queued
from astrolabe_diffusers.live.session import Block, LiveSession, Mark
from tests.live.helpers import make_model, save_loras
from tests.pipelines.test_scenes import A, B
from tests.training.helpers import threads_left
from tests.waiting import wait_for


@pytest.fixture(scope="module")
def model():
    return make_model()


class Watched:
    """A session, what its listener was told, and a viewer who sees every frame at once if it is asked to."""

    def __init__(self, model, engine, watches=True, **settings):
        self.session = LiveSession(model, settings.pop("prompt", A), settings.pop("seed", 0), **settings)
        self.engine, self.watches, self.told = engine, watches, []

    def __call__(self, item):
        self.told.append(item)
        if isinstance(item, Block) and self.watches:
            self.session.show(item.first_frame + len(item.frames) - 1)

    def add(self, instead_of=None):
        self.engine.add(self.session, self, instead_of and instead_of.session)
        return self

    def of(self, kind):
        return [item for item in self.told if isinstance(item, kind)]

    @property
    def positions(self):
        return [item.position for item in self.of(Queued)]


@contextmanager
def engine_of(**settings):
    before = set(threading.enumerate())
    with LiveEngine(**settings) as engine:
        yield engine
    assert threads_left(before) <= {"tqdm_monitor"}


def test_first_blocks_are_sent_when_the_next_ones_can_be_in_time():
    """As those of others, who take turns, let them; not of those who pause."""
    model, asked = make_model(), []
    model.block_seconds = 100.0
    with engine_of(sessions=3) as engine:
        paused, *watched = [Watched(model, engine) for _ in range(3)]
        paused.session.pause()
        paused.add()
        for one in watched:
            one.session.start_delay = lambda turn_seconds, _: asked.append(turn_seconds) or 1000.0
            one.session.pacing._recent.append(100.0)
            one.add()
        wait_for(lambda: all(len(one.of(Block)) > 2 for one in watched), 60)
    assert len(asked) == 2 and asked[1] == 200
    for one in watched:
        assert one.session.begins_at > time.monotonic() + 900
    assert paused.session.begins_at == 0


def test_first_blocks_of_others_come_before_the_second_one(monkeypatch):
    """They take as long as this one's did; those of who have one already, or pause, do not."""
    make = LiveSession.make_block

    def slow(self):
        blocks, marks = make(self)
        for block in blocks:
            block.seconds += 7.0
        return blocks, marks

    monkeypatch.setattr(LiveSession, "make_block", slow)
    model, asked = make_model(), []
    model.block_seconds = 2.0
    engine = LiveEngine(sessions=3)
    paused, *watched = [Watched(model, engine).add() for _ in range(3)]
    paused.session.pause()
    for one in watched:
        one.session.start_delay = lambda turn_seconds, first_seconds: asked.append(first_seconds) or 0.0
    with engine:  # no block is made before all are there
        wait_for(lambda: all(one.of(Block) for one in watched), 60)
    assert 5 <= asked[0] < 6 and asked[1] == 0


def test_blocks_of_sessions_in_turns_are_those_of_each_alone(tmp_path):
    loras = save_loras(tmp_path / "loras")
    model = make_model(dict(zip(loras, (1.0, 0.0))))
    with engine_of(sessions=3) as engine:
        viewers = [Watched(model, engine, seed=seed, compare=seed == 2) for seed in range(3)]
        for number, viewer in enumerate(viewers):
            viewer.session.send({"type": "lora", "weights": {"first": 0.5 * number}})
            viewer.add()
        wait_for(lambda: all(viewer.session.num_blocks >= 4 for viewer in viewers))
        viewers[1].session.send({"type": "prompt", "prompt": B, "transition": "recache"})
        wait_for(lambda: viewers[1].of(Mark)[1:] and all(viewer.session.num_blocks >= 12 for viewer in viewers))
        records = [viewer.session.record() for viewer in viewers]
        for viewer in viewers:
            engine.remove(viewer.session)
    for viewer, record in zip(viewers, records):
        events, count = record["events"], record["num_blocks"]
        alone = LiveSession(model, A, record["seed"], compare=record["compare"], events=events)
        made = [block for _ in range(count) for block in alone.make_block()[0]]
        sent = [block for block in viewer.of(Block) if block.number < count]
        assert [(b.number, b.lane, b.first_frame) for b in sent] == [(b.number, b.lane, b.first_frame) for b in made]
        assert all(np.array_equal(a.frames, b.frames) for a, b in zip(sent, made))


def test_it_makes_no_more_than_is_looked_at(model):
    with engine_of() as engine:
        viewer = Watched(model, engine, watches=False).add()
        wait_for(lambda: viewer.session.num_blocks == 2)
        time.sleep(0.3)
        assert viewer.session.num_blocks == 2
        viewer.session.show(8)
        engine.wake()
        wait_for(lambda: viewer.session.num_blocks == 3)


def test_pause_and_resume(model):
    with engine_of() as engine:
        viewer = Watched(model, engine).add()
        wait_for(lambda: viewer.session.num_blocks > 3)
        viewer.session.pause()
        time.sleep(0.2)
        count = viewer.session.num_blocks
        time.sleep(0.3)
        assert viewer.session.num_blocks == count
        viewer.session.pause(False)
        engine.wake()
        wait_for(lambda: viewer.session.num_blocks > count + 2)


def test_three_on_one_slot(model):
    with engine_of(sessions=1, waiting=2) as engine:
        first, second, third = (Watched(model, engine).add() for _ in range(3))
        assert (first.positions, second.positions, third.positions) == ([0], [1], [2])
        with pytest.raises(FullError, match="2 viewers are waiting already: come again later"):
            Watched(model, engine).add()
        wait_for(lambda: first.of(Block))
        assert not second.of(Block) and engine.running == 1
        engine.remove(first.session)
        wait_for(lambda: second.of(Block))
        assert (second.positions, third.positions) == ([1, 0], [2, 1])
        engine.remove(second.session)
        wait_for(lambda: third.of(Block))
        assert third.positions == [2, 1, 0]


def test_who_gives_up_waiting_lets_others_up(model):
    with engine_of(sessions=1) as engine:
        first, second, third = (Watched(model, engine).add() for _ in range(3))
        engine.remove(second.session)
        assert third.positions == [2, 1]
        assert first.positions == [0]


def test_a_restart_keeps_its_place(model):
    with engine_of(sessions=1) as engine:
        first, second, third = (Watched(model, engine).add() for _ in range(3))
        again = Watched(model, engine, seed=5).add(instead_of=first)
        waiting = Watched(model, engine, seed=6).add(instead_of=second)
        assert (again.positions, waiting.positions, third.positions) == ([0], [1], [2])
        wait_for(lambda: len(again.of(Block)) > 3)
        count = len(first.of(Block))
        time.sleep(0.2)
        assert len(first.of(Block)) == count
        assert [block.number for block in again.of(Block)][:3] == [0, 1, 2]


def test_who_runs_out_first_is_served_in_time(model):
    """Beside a session that takes all it can get."""
    with engine_of(sessions=2) as engine:
        calm, hungry = Watched(model, engine, watches=False).add(), Watched(model, engine).add()
        wait_for(lambda: hungry.session.num_blocks > 10)
        assert calm.session.num_blocks == 2
        calm.session.show(8)
        began = time.monotonic()
        engine.wake()
        wait_for(lambda: calm.session.num_blocks == 3)
        assert time.monotonic() - began < 12 / model.frame_rate  # so long its frames last


def test_a_turn_is_as_long_as_the_blocks_of_all_who_want_some(model, monkeypatch):
    make = LiveSession.make_block

    def slow(self):
        blocks, marks = make(self)
        for block in blocks:
            block.seconds += 5.0 * (self.seed + 1)
        return blocks, marks

    monkeypatch.setattr(LiveSession, "make_block", slow)
    monkeypatch.setattr(LiveSession, "block_seconds", property(lambda self: 5.0 * (self.seed + 1)))
    monkeypatch.setattr(LiveSession, "due_at", lambda self, turn: math.inf if self.paused else 0.0)
    with engine_of(sessions=3) as engine:
        first, second = (Watched(model, engine, seed=seed).add() for seed in (0, 1))
        third = Watched(model, engine, seed=2, watches=False)
        third.session.pause()
        third.add()
        wait_for(lambda: len(first.of(Block)) > 6 and len(second.of(Block)) > 6)
        turns = [block.turn_seconds for viewer in (first, second) for block in viewer.of(Block)[3:6]]
        assert all(15 <= turn < 16 for turn in turns)
        second.session.pause()
        time.sleep(0.3)
        count = len(first.of(Block))
        wait_for(lambda: len(first.of(Block)) > count + 3)
        assert all(5 <= block.turn_seconds < 6 for block in first.of(Block)[count + 1 :])


def test_a_failure_ends_one_session_alone(model, caplog):
    with engine_of(sessions=2) as engine:
        good = Watched(model, engine).add()
        bad = Watched(model, engine)
        bad.session._open = lambda: (frames for frames in ())
        bad.add()
        wait_for(lambda: bad.of(Ended))
        assert bad.of(Ended)[0].reason == "the video has come to its end"
        broken = Watched(model, engine)
        broken.session._open = lambda: (1 / 0 for _ in range(1))
        broken.add()
        wait_for(lambda: broken.of(Ended))
        assert broken.of(Ended)[0].reason == "the session failed: division by zero"
        assert "ZeroDivisionError: division by zero" in caplog.text
        count = good.session.num_blocks
        wait_for(lambda: good.session.num_blocks > count + 2)
        assert engine.running == 1


def test_a_listener_that_fails_is_a_session_that_left(model):
    with engine_of(sessions=2) as engine:
        good = Watched(model, engine).add()

        class Gone(Watched):
            def __call__(self, item):
                super().__call__(item)
                if isinstance(item, Block):
                    self.engine.remove(self.session)

        gone = Gone(model, engine).add()
        wait_for(lambda: engine.running == 1)
        assert len(gone.of(Block)) == 1
        count = good.session.num_blocks
        wait_for(lambda: good.session.num_blocks > count + 2)


def test_a_paused_session_makes_room_for_one_that_waits(model):
    with engine_of(sessions=1, idle_seconds=0.3) as engine:
        first = Watched(model, engine).add()
        wait_for(lambda: first.of(Block))
        first.session.pause()
        time.sleep(0.5)
        assert not first.of(Ended)  # nobody waits
        first.session.pause()
        second = Watched(model, engine).add()
        wait_for(lambda: second.of(Block))
        assert first.of(Ended)[0].reason == "nothing was seen for 0.3 s, and others wait"
        third = Watched(model, engine).add()
        time.sleep(0.6)
        assert not second.of(Ended) and not third.of(Block)  # it is looked at


def test_of_paused_sessions_no_more_end_than_others_wait(model):
    """Those first of which nothing was seen for longest."""
    with engine_of(sessions=3, idle_seconds=0.3) as engine:
        paused = [Watched(model, engine, seed=seed).add() for seed in range(3)]
        for one in paused:
            wait_for(lambda: one.of(Block))
            one.session.pause()
        time.sleep(0.2)  # the block that was being made
        for index in (1, 0, 2):
            paused[index].session.pause()
        time.sleep(0.5)
        for left in ([0, 1, 0], [1, 1, 0]):
            waiting = Watched(model, engine).add()
            wait_for(lambda: waiting.of(Block))
            assert [len(one.of(Ended)) for one in paused] == left


def test_who_has_waited_long_gets_its_turn(model):
    with engine_of(sessions=1, idle_seconds=0.5) as engine:
        first, second, third = (Watched(model, engine).add() for _ in range(3))
        time.sleep(1.0)
        engine.remove(first.session)
        wait_for(lambda: second.of(Block) or second.of(Ended))
        assert second.of(Block) and not second.of(Ended) and not third.of(Block)


def test_a_session_that_left_is_gone_within_seconds(model):
    """Cache, decoder and frames, without the help of the garbage collector, while another one goes on and while none
    does."""
    for others in (1, 0):
        with engine_of(sessions=2) as engine:
            rest = [Watched(model, engine).add() for _ in range(others)]
            viewers = [Watched(model, engine).add()]
            wait_for(lambda: viewers[0].session.num_blocks > 2)
            for watched in (*rest, *viewers):
                watched.session.pause()
            time.sleep(0.2)
            gc.collect()
            generators = [x for x in gc.get_objects() if type(x).__name__ == "BlockGenerator"]
            keys = [weakref.ref(x.kv_cache.get(0).key) for x in generators]
            assert len(keys) == others + 1
            session = weakref.ref(viewers[0].session)
            del generators, watched
            gc.disable()
            try:
                engine.remove(viewers.pop().session)
                wait_for(lambda: session() is None, 3)
                assert sum(key() is not None for key in keys) == others
            finally:
                gc.enable()
            for other in rest:
                engine.remove(other.session)
