import pytest

from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.rollout.past import make_windows
from tests.training.helpers import config


def windows(num_frames=21, sink_size=0, **values):
    return make_windows(config(**values), num_frames, 3, sink_size)


def test_without_a_window_the_whole_video_is_trained():
    result = windows()
    assert (result.size, result.starts) == (21, [0])


def test_where_windows_may_begin():
    values = {"window_size": 6, "sample_frames": 15}
    assert windows(**values).starts == [0, 3, 6, 9]
    assert windows(window_size=6).starts == [0, 3, 6, 9, 12, 15]  # of the whole video
    assert windows(**values, window_selection="first").starts == [0]
    assert windows(**values, window_selection="last").starts == [9]
    assert windows(**values, window_selection="choices", window_choices="6,3").starts == [6, 3]
    shared = {"shared_past": True, "train_batch_size": 2, "samples_per_prompt": 4}
    assert windows(**values, **shared).starts == [3, 6, 9]
    assert windows(sink_size=6, **values, **shared).starts == [6, 9]


def test_the_published_window():
    """`window_choices: [21]` is where it starts: 42 latent frames are sampled of the 240 that there might be."""
    values = {"window_size": 21, "sample_frames": 240, "window_selection": "choices", "window_choices": [21]}
    result = windows(num_frames=240, sink_size=3, **values)
    assert {result.past(epoch).num_frames + result.size for epoch in range(20)} == {42}


def test_random_starts_are_reproducible_and_cover_all():
    result = windows(window_size=6, sample_frames=15)
    starts = [result.past(epoch).num_frames for epoch in range(60)]
    assert starts == [windows(window_size=6, sample_frames=15).past(epoch).num_frames for epoch in range(60)]
    assert set(starts) == {0, 3, 6, 9}
    assert starts != [windows(window_size=6, sample_frames=15, seed=1).past(epoch).num_frames for epoch in range(60)]


@pytest.mark.parametrize(
    "values,words",
    [
        ({"window_size": 7}, "window_size=7 is no whole number of blocks of 3"),
        ({"window_size": 6, "sample_frames": 10}, "sample_frames=10 is no whole number"),
        ({"window_size": 24}, "window_size=24 is longer than the video, 21"),
        ({"window_size": 6, "window_selection": "choices"}, "a window may begin at 0, 3, ... 15"),
        ({"window_size": 6, "window_selection": "choices", "window_choices": "3,4,18"}, r"window_choices \[4, 18\]"),
        ({"window_size": 6, "window_selection": "choices", "window_choices": "a"}, "window_choices must be whole"),
        ({"window_size": 6, "window_selection": "middle"}, "random, first, last, choices"),
        (
            {"window_size": 21, "shared_past": True, "train_batch_size": 2, "samples_per_prompt": 4},
            "no window begins after the model's sink",
        ),
        ({"shared_past": True}, "shared_past needs window_size"),
        ({"window_size": 6, "shared_past": True, "train_batch_size": 5}, "train_batch_size=5 has to divide"),
        ({"window_size": 6, "context": "noisy"}, "no window_size"),
    ],
)
def test_errors(values, words):
    with pytest.raises(UserError, match=words):
        windows(**values)
