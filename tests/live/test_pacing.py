"""The flow of a video, by a clock of ours: when blocks are due, and for how long the first one is held back."""

import math

import pytest

from astrolabe_diffusers.live import session as session_module
from astrolabe_diffusers.live.session import LiveSession
from tests.live.helpers import make_model
from tests.pipelines.test_scenes import A


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


def test_what_a_session_has_measured_counts_alone():
    model = make_model()
    model.block_seconds = 100.0
    session = LiveSession(model, A, 0)
    session.make_block()  # the first one is not measured
    assert session.block_seconds == 100
    session.make_block()
    assert 0 < session.block_seconds < 50


def test_a_picture_that_stood_still_makes_blocks_come_earlier(model, clock):
    session = LiveSession(model, A, 0)
    session.make_block(), session.make_block()
    rate = model.frame_rate

    def show_up_to(frame, wait):
        """At the frame rate, but for the first one, which comes `wait` seconds late."""
        clock.now += wait
        for shown in range(session.pacing._shown + 1, frame + 1):
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
        return session.pacing._shown_at + (session.num_frames - 1 - session.pacing._shown) / rate - session.due_at(0.1)

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
