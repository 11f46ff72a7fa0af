"""The world of tiny_shapes: its captions, its palette and how its shapes are drawn."""

import itertools

import pytest
import torch

from astrolabe_diffusers.rewards.metrics.tiny_shapes_world import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    SHAPES,
    Object,
    Scene,
    caption,
    parse_caption,
    shape_mask,
    shortest,
)
from tests.rewards.drawn_clips import SIZE, draw_mask


def test_captions_and_scenes_are_the_same_thing():
    kinds = itertools.cycle(itertools.product(SHAPES, DIRECTIONS))
    for background in BACKGROUNDS:
        for count in (1, 2, 3):
            for colors in itertools.permutations([color for color in COLORS if color != background], count):
                scene = Scene(tuple(Object(color, *next(kinds)) for color in colors), background)
                assert parse_caption(caption(scene)) == scene


def test_captions_read_as_english():
    objects = Object("red", "circle", "left"), Object("orange", "square", "up"), Object("blue", "cross", "down")
    starts = (
        "a red circle moves left",
        "a red circle moves left and an orange square moves up",
        "a red circle moves left, an orange square moves up and a blue cross moves down",
    )
    for count, start in enumerate(starts, 1):
        scene = Scene(objects[:count], "white")
        assert caption(scene) == f"{start} on a white background"
        assert parse_caption(f" {start.title()}  on a white\nbackground. ") == scene


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a cat",
        "a pink circle moves left on a white background",
        "a red circle moves left",
        "on a white background",
        "a red circle moves left on a white background and stops",
        "a red circle moves left and on a white background",
        "a red circle moves left a green square moves up on a white background",
        ", ".join(f"a {color} circle moves left" for color in list(COLORS)[:4]) + " on a white background",
    ],
)
def test_other_prompts_are_refused_in_one_line(prompt):
    with pytest.raises(ValueError, match="is no tiny_shapes caption; the form is .* with color red green") as caught:
        parse_caption(prompt)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "prompt",
    [
        "a blue circle moves left on a blue background",
        "a red circle moves left and a red square moves up on a white background",
    ],
)
def test_two_things_of_one_colour_are_refused_in_one_line(prompt):
    with pytest.raises(ValueError, match="its objects and its background differ in colour") as caught:
        parse_caption(prompt)
    assert "\n" not in str(caught.value)


def test_palette_colours_are_far_apart():
    every = torch.tensor(list({**COLORS, **BACKGROUNDS}.values()))
    distances = torch.cdist(every, every)
    assert distances[~torch.eye(len(every), dtype=torch.bool)].min() >= 0.45
    for color, background in itertools.product(COLORS, BACKGROUNDS):
        if color != background:
            assert torch.dist(torch.tensor(COLORS[color]), torch.tensor(BACKGROUNDS[background])) >= 0.57


def test_shape_masks_equal_drawn_ones():
    places = [(30.3, 46.9), (1.0, 60.0), (95.2, 94.5), (48.0, 0.4)]
    index, center, radius, drawn = [], [], [], []
    for i, shape in enumerate(SHAPES):
        for j, place in enumerate(places):
            index.append(i), center.append(place), radius.append(11.0 + 4 * j)
            drawn.append(draw_mask(shape, *place, radius[-1]))
    masks, drawn = shape_mask(*map(torch.tensor, (index, center, radius)), SIZE, SIZE), torch.stack(drawn)
    difference = (masks - drawn).abs()
    assert difference.mean() < 0.002 and difference.max() < 0.4
    torch.testing.assert_close(masks.sum((1, 2)), drawn.sum((1, 2)), atol=0, rtol=0.02)
    assert masks.min() == 0 and masks.max() == 1 and ((masks > 0) & (masks < 1)).any()


def test_the_shorter_way_may_cross_the_border():
    assert shortest(torch.tensor([3.0, 47.0, 49.0, -49.0, 95.0]), 96).tolist() == [3, 47, -47, 47, -1]
