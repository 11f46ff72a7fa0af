"""The grammar of scenes."""

import pytest

from astrolabe_diffusers.pipelines.scene_prompt import (
    Scene,
    escape_scenes,
    has_scene_marks,
    parse_scenes,
    plan_scenes,
)


@pytest.mark.parametrize(
    "prompt,scenes",
    [
        ("a cat", [Scene("a cat")]),
        ("", [Scene("")]),
        ("a[8s] | b[12s] | c", [Scene("a", 8.0), Scene("b", 12.0), Scene("c")]),
        ("a[10s#] | b", [Scene("a", 10.0), Scene("b", transition="cut")]),
        ("a[#]|b[.5s]|c", [Scene("a"), Scene("b", 0.5, transition="cut"), Scene("c")]),
        ("a [ 1.5 s # ] \n| b", [Scene("a", 1.5), Scene("b", transition="cut")]),
        (
            "a[10s flush] | b[ rope_cut ]|c [2s recache]| d[roll] | e [cut]|f",
            [
                Scene("a", 10.0),
                Scene("b", transition="flush"),
                Scene("c", 2.0, "rope_cut"),
                Scene("d", transition="recache"),
                Scene("e"),
                Scene("f", transition="cut"),
            ],
        ),
        # The cut at the end of the last scene cuts nothing.
        ("a | b[2s#]", [Scene("a"), Scene("b", 2.0)]),
        (r"this \| that \[8s\] [4s] | c:\\d \e]", [Scene("this | that [8s]", 4.0), Scene(r"c:\d \e]")]),
    ],
)
def test_parse(prompt, scenes):
    assert parse_scenes(prompt) == scenes


@pytest.mark.parametrize(
    "prompt,place,message",
    [
        ("a | | b", 4, "no text"),
        ("[8s] | b", 1, "no text"),
        ("a |", 4, "no text"),
        ("a [red] car", 3, r"\[ is a bracket"),
        ("a[8s] b", 2, "at a scene's end"),
        ("a[0s]", 2, "a duration is [8s]"),
        ("a[8]", 2, "a duration is [8s]"),
        ("a[-2s]", 2, "a duration is [8s]"),
        ("a[]", 2, "a duration is [8s]"),
        ("a[8s][2s]", 2, "at a scene's end"),
        ("a[8s fade] | b", 2, "with one of roll, recache, flush, rope_cut, cut"),
        ("a[8sflush] | b", 2, "with one of roll"),
        ("a[flushed] | b", 2, "with one of roll"),
        ("a[flush #] | b", 2, "with one of roll"),
        ("a[flush 8s] | b", 2, "with one of roll"),
        ("a | b[8s", 6, "a duration is [8s]"),
        ("a | b[86401s]", 6, "at most 86400 seconds"),
        (f"a[{'9' * 400}s]", 2, "at most 86400 seconds"),
    ],
)
def test_errors_point_at_the_place(prompt, place, message):
    with pytest.raises(ValueError) as error:
        parse_scenes(prompt)
    assert f"character {place}: " in str(error.value) and message in str(error.value)
    assert "\n" not in str(error.value)


def test_plan():
    """Blocks of 0.75 s: rounded down, at least one, and 14 where nothing is said."""
    scenes = [Scene("a", 8.0), Scene("b", 0.1, transition="cut"), Scene("c", 2.25), Scene("d")]
    starts = dict(zip((0, 10, 11, 14), scenes))
    assert plan_scenes(scenes, 0.75) == (starts, 28)
    assert plan_scenes(scenes, 0.75, num_blocks=50) == (starts, 50)
    assert plan_scenes(scenes, 0.75, num_blocks=11) == ({0: scenes[0], 10: scenes[1]}, 11)


def test_decimal_fractions_make_whole_blocks():
    assert all(plan_scenes([Scene("a", 0.25 * n)], 0.25)[1] == n for n in range(1, 400))
    assert all(plan_scenes([Scene("a", round(0.3 * n, 1))], 0.3)[1] == n for n in range(1, 400))


@pytest.mark.parametrize("text", ["a cat", "a | b [8s]", "[red] a\\b \\", "a [8s#", "\\|"])
def test_escaped_text_means_itself(text):
    assert parse_scenes(escape_scenes(text)) == [Scene(text)]


@pytest.mark.parametrize("prompt", ["a | b", "a [1s] | b [1s]", "a [2s]", "a [#]", r"a \| b"])
def test_marks_of_scenes(prompt):
    assert has_scene_marks(prompt)


@pytest.mark.parametrize("prompt", ["", " a cat ", "a |", "| a", "a || b", "a [red] cat", "a | b [8]", "[8s] a"])
def test_what_is_no_scene_by_the_grammar_has_no_marks(prompt):
    assert not has_scene_marks(prompt)
