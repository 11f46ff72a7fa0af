"""The prompt-match reward, on clips that were drawn point by point."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from astrolabe_diffusers.rewards import get_reward
from astrolabe_diffusers.rewards.metrics.tiny_shapes import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    SHAPES,
    caption,
    parse_caption,
    shape_mask,
)
from tests.rewards.drawn_clips import draw_clip, draw_mask, draw_masks, paint


PARTS = ("color", "shape", "background", "direction")
RED_CIRCLE = ("red", "circle", "black", "right")


def match(clips, captions):
    """Parts [B] and the score [B] for clips [F, 3, 64, 64] and attribute tuples."""
    output = get_reward("tiny_shapes_prompt_match").score(torch.stack(clips), [caption(*names) for names in captions])
    assert tuple(output.info) == PARTS
    for values in (output.scores, *output.info.values()):
        assert values.dtype == torch.float32 and values.shape == (len(clips),)
        assert values.min() >= 0 and values.max() <= 1
    torch.testing.assert_close(output.scores, sum(output.info.values()) / 4)
    return output.scores, output.info


def match_one(clip, names=RED_CIRCLE):
    scores, parts = match([clip], [names])
    return scores.item(), {name: part.item() for name, part in parts.items()}


def drawn_variety():
    """Every shape with every colour and every pair of the other values, at many places, sizes and speeds."""
    random = torch.Generator().manual_seed(0)
    scenes, clips = [], []
    others = itertools.cycle(itertools.product(BACKGROUNDS, DIRECTIONS))
    for color, shape in itertools.product(COLORS, SHAPES):
        for background, direction in itertools.islice(others, 3):
            if background == color:
                continue
            draw = torch.rand(4, generator=random).tolist()
            motion = {"start": (64 * draw[0], 64 * draw[1]), "radius": 8 + 5 * draw[2], "speed": 1.2 + 1.2 * draw[3]}
            scenes.append((color, shape, background, direction))
            clips.append(draw_clip(*scenes[-1], frames=5, **motion))
    return scenes, clips


@pytest.fixture(scope="module")
def variety():
    return drawn_variety()


@pytest.fixture(scope="module")
def right(variety):
    scenes, clips = variety
    return match(clips, scenes)[1]


def test_drawn_clips_fit_their_captions_in_every_part(variety, right):
    scenes, _ = variety
    for name, values in right.items():
        worst = values.argmin()
        assert values[worst] >= 0.95, f"{name} of {scenes[worst]}"
        assert values.mean() >= 0.98


@pytest.mark.parametrize("axis", range(4), ids=PARTS)
def test_one_wrong_word_costs_its_part_and_no_other(variety, right, axis):
    scenes, clips = variety
    values = list(ATTRIBUTES.values())[axis]
    for shift in range(1, len(values)):
        wrong = [
            tuple(values[(values.index(v) + shift) % len(values)] if i == axis else v for i, v in enumerate(names))
            for names in scenes
        ]
        _, parts = match(clips, wrong)
        for name in PARTS:
            if name == PARTS[axis]:
                assert parts[name].max() < 0.2
            else:
                torch.testing.assert_close(parts[name], right[name])


def test_a_still_object_has_no_direction():
    score, parts = match_one(paint(draw_mask("circle", 20, 30, 10).expand(21, 64, 64), "red", "black"))
    assert parts["direction"] == 0 and min(parts["color"], parts["shape"], parts["background"]) > 0.95
    assert score < 0.76


@pytest.mark.parametrize("speed, low, high", [(0.2, 0.0, 0.15), (0.5, 0.3, 0.6), (1.0, 0.95, 1.0), (2.4, 0.95, 1.0)])
def test_slow_motion_counts_in_part(speed, low, high):
    assert low <= match_one(draw_clip(*RED_CIRCLE, speed=speed))[1]["direction"] <= high


def test_an_empty_video_has_only_its_background():
    _, parts = match_one(torch.zeros(21, 3, 64, 64))
    assert parts == {"color": 0, "shape": 0, "background": pytest.approx(1, abs=1e-4), "direction": 0}


@pytest.mark.parametrize("gap", [(0, 32), (24, 24), (32, 0), (30, 32)])
def test_two_objects_are_not_one(gap):
    masks = draw_masks("circle", "right")
    two = torch.maximum(masks, masks.roll(gap, dims=(1, 2)))
    score, parts = match_one(paint(two, "red", "black"))
    assert max(parts["color"], parts["shape"], parts["direction"]) < 0.05 and score < 0.3


def test_a_blob_that_fills_the_frame_is_no_object():
    for radius in (24, 30, 45):
        score, parts = match_one(draw_clip(*RED_CIRCLE, radius=radius))
        assert max(parts["color"], parts["shape"]) < 0.1 and score < 0.3
    assert match_one(paint(torch.ones(21, 64, 64), "red", "black"))[0] == pytest.approx(0, abs=1e-6)


def test_a_speck_is_no_object():
    score, parts = match_one(draw_clip(*RED_CIRCLE, radius=3))
    assert max(parts["color"], parts["shape"], parts["direction"]) < 0.05


def test_noise_is_nothing():
    assert match_one(torch.rand(21, 3, 64, 64))[0] < 0.05


def test_a_little_noise_costs_little_and_more_costs_more():
    noise = torch.randn(21, 3, 64, 64)
    clip = draw_clip(*RED_CIRCLE)
    scores = [match_one((clip + s * noise).clamp(0, 1))[0] for s in (0, 0.05, 0.15, 0.4)]
    assert scores[1] > 0.95 and scores[0] >= scores[1] > scores[2] > scores[3] and scores[3] < 0.2


def blurred(clip, sigma):
    steps = torch.arange(-15, 16).float()
    kernel = torch.exp(-steps.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, 31)
    padded = F.pad(clip, (15,) * 4, mode="circular")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)


@pytest.mark.parametrize("shape", SHAPES)
def test_blur_costs_shape_gradually_and_leaves_direction(shape):
    names = ("purple", shape, "gray", "down")
    clip = draw_clip(*names)
    parts = [match_one(video, names)[1] for video in (clip, *(blurred(clip, sigma) for sigma in (1, 3, 6)))]
    assert parts[1]["shape"] > 0.85 and (shape == "circle" or parts[3]["shape"] < parts[1]["shape"] - 0.3)
    assert all(later["shape"] <= earlier["shape"] + 0.02 for earlier, later in zip(parts, parts[1:]))
    assert parts[2]["direction"] > 0.95 and parts[2]["background"] > 0.95


def test_a_fading_object_loses_colour_first():
    clip = draw_clip(*RED_CIRCLE)
    colors = [match_one(strength * clip)[1]["color"] for strength in (1, 0.8, 0.65, 0.5)]
    assert all(later < earlier for earlier, later in zip(colors, colors[1:])) and colors[-1] < 0.3
    assert match_one(0.65 * clip)[1]["shape"] > 0.95


def test_between_circle_and_square_the_shape_is_undecided():
    y, x = torch.meshgrid(torch.arange(64) - 31.5, torch.arange(64) - 31.5, indexing="ij")

    def parts(power):
        mask = (10.5 - (x.abs() ** power + y.abs() ** power) ** (1 / power)).clamp(0, 1).expand(5, 64, 64)
        clip = paint(mask, "red", "black")
        return [match_one(clip, ("red", shape, "black", "right"))[1]["shape"] for shape in SHAPES]

    circle, square, triangle, cross = zip(*(parts(power) for power in (2, 3, 4, 6, 20)))
    assert circle[0] > 0.95 and square[-1] > 0.95
    assert all(a > b for a, b in zip(circle, circle[1:])) and all(a < b for a, b in zip(square, square[1:]))
    assert 0.2 < circle[2] < 0.8 and 0.2 < square[2] < 0.8
    assert max(triangle + cross) < 0.05


def test_half_red_and_half_yellow_is_neither_nor_orange():
    masks = draw_masks("square", "right", start=(32, 32), speed=0.0)
    clip = paint(masks, "red", "black")
    clip[..., 32:] = paint(masks, "yellow", "black")[..., 32:]
    for color in ("red", "yellow", "orange"):
        assert match_one(clip, (color, "square", "black", "right"))[1]["color"] < 0.2


HALVES = {
    "color": ("blue", "circle", "black", "right"),
    "shape": ("red", "cross", "black", "right"),
    "background": ("red", "circle", "white", "right"),
    "direction": ("red", "circle", "black", "up"),
}


@pytest.mark.parametrize("part", PARTS)
def test_right_for_half_of_the_time_gets_half(part):
    frames = 40
    first = draw_clip(*RED_CIRCLE, frames=frames // 2)
    x = 20 + 1.8 * (frames // 2 - 1)
    second = draw_clip(*HALVES[part], frames=frames // 2, start=(x, 30))
    _, parts = match_one(torch.cat([first, second]))
    for name in PARTS:
        if name == part:
            assert parts[name] == pytest.approx(0.5, abs=0.07)
        else:
            assert parts[name] > 0.95 or (name == "direction" and parts[name] > 0.85)


def test_an_object_that_flashes_loses_in_proportion():
    clip = draw_clip(*RED_CIRCLE)
    for frames in (5, 10, 15):
        shown = clip.clone()
        shown[frames:] = 0
        _, parts = match_one(shown)
        assert parts["color"] == pytest.approx(frames / 21, abs=0.02)
        assert parts["shape"] == pytest.approx(frames / 21, abs=0.02)
        assert parts["direction"] < frames / 21 + 0.03
    every_other = clip.clone()
    every_other[1::2] = 0
    assert match_one(every_other)[1]["direction"] == 0


def test_back_and_forth_is_no_direction():
    clip = draw_clip(*RED_CIRCLE)
    there_and_back = clip[[0, 1, 2, 1] * 5 + [0]]
    assert match_one(there_and_back)[1]["direction"] < 0.1
    assert match_one(clip.flip(0))[1]["direction"] == 0


def test_jumps_are_no_motion():
    """33 pixels to the right on a frame of 64 that wraps around is as good as 31 to the left."""
    for direction in ("left", "right"):
        clip = draw_clip("red", "circle", "black", "right", speed=31.0)
        assert match_one(clip, ("red", "circle", "black", direction))[1]["direction"] == 0


def test_a_diagonal_is_half_of_each_direction():
    masks = [draw_mask("circle", 20 + 1.3 * f, 30 + 1.3 * f, 10) for f in range(21)]
    clip = paint(torch.stack(masks), "red", "black")
    parts = {d: match_one(clip, ("red", "circle", "black", d))[1]["direction"] for d in DIRECTIONS}
    assert parts["right"] == pytest.approx(0.5, abs=0.03) and parts["down"] == pytest.approx(0.5, abs=0.03)
    assert parts["left"] == 0 and parts["up"] == 0


def test_a_single_frame_has_no_direction():
    score, parts = match_one(draw_clip(*RED_CIRCLE, frames=1))
    assert parts["direction"] == 0 and min(parts["color"], parts["shape"], parts["background"]) > 0.95


@pytest.mark.parametrize("scale", [2, 0.5])
def test_other_resolutions_are_measured_alike(scale):
    mode = "area" if scale < 1 else "nearest"
    clip = F.interpolate(draw_clip(*RED_CIRCLE, radius=12.0), scale_factor=scale, mode=mode)
    assert min(match_one(clip)[1].values()) > 0.85


def test_a_batch_equals_its_singles(variety):
    scenes, clips = variety
    clips = [(clip + 0.1 * torch.randn_like(clip)).clamp(0, 1) for clip in clips[:12]]
    scenes = scenes[1:13]
    scores, parts = match(clips, scenes)
    for index in range(12):
        score, single = match_one(clips[index], scenes[index])
        assert score == pytest.approx(scores[index].item(), abs=1e-5)
        assert single == {name: pytest.approx(part[index].item(), abs=1e-5) for name, part in parts.items()}


def test_memory_layout_does_not_matter():
    """A still video is often an expanded frame, a decoded one a transposed tensor."""
    reward, captions = get_reward("tiny_shapes_prompt_match"), [caption("red", "cross", "gray", "up")]
    clip = draw_clip("red", "cross", "gray", "up")[None]
    transposed = clip.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(reward.score(transposed, captions).scores, reward.score(clip, captions).scores)
    gray = torch.tensor(BACKGROUNDS["gray"]).view(1, 1, 3, 1, 1)
    for still in (clip[:, :1].expand_as(clip), gray.expand_as(clip)):
        assert torch.equal(reward.score(still, captions).scores, reward.score(still.clone(), captions).scores)


def test_half_precision_videos_are_measured_in_full(variety):
    scenes, clips = variety
    whole, _ = match(clips[:8], scenes[:8])
    half, _ = match([clip.bfloat16() for clip in clips[:8]], scenes[:8])
    torch.testing.assert_close(half, whole, atol=0.02, rtol=0)


def test_shape_masks_equal_drawn_ones():
    places = [(20.3, 30.9), (1.0, 40.0), (63.2, 62.5), (32.0, 0.4)]
    index, center, radius, drawn = [], [], [], []
    for i, shape in enumerate(SHAPES):
        for j, place in enumerate(places):
            index.append(i), center.append(place), radius.append(8.0 + 1.5 * j)
            drawn.append(draw_mask(shape, *place, radius[-1]))
    masks = shape_mask(torch.tensor(index), torch.tensor(center), torch.tensor(radius))
    difference = (masks - torch.stack(drawn)).abs()
    assert difference.mean() < 0.002 and difference.max() < 0.4
    torch.testing.assert_close(masks.sum((1, 2)), torch.stack(drawn).sum((1, 2)), atol=0, rtol=0.02)
    assert masks.min() == 0 and masks.max() == 1 and ((masks > 0) & (masks < 1)).any()


def test_captions_and_their_attributes_are_the_same_thing():
    for names in itertools.product(*ATTRIBUTES.values()):
        assert tuple(parse_caption(caption(*names)).values()) == names
    assert parse_caption(" A red Circle moves left on a white background. ")["shape"] == "circle"


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a cat",
        "a pink circle moves left on a white background",
        "a red circle moves left",
        "a red circle moves left on a red background",
        "a red circle moves left on a white background and stops",
    ],
)
def test_other_prompts_are_refused_in_one_line(prompt):
    with pytest.raises(ValueError, match="is no tiny_shapes caption; the form is .* with color red green") as caught:
        get_reward("tiny_shapes_prompt_match").score(torch.zeros(1, 2, 3, 64, 64), [prompt])
    assert "\n" not in str(caught.value)


def test_palette_colours_are_far_apart():
    every = torch.tensor(list({**COLORS, **BACKGROUNDS}.values()))
    assert torch.cdist(every, every).fill_diagonal_(9).min() > 0.45
    for color, background in itertools.product(COLORS, BACKGROUNDS):
        if color != background:
            assert torch.dist(torch.tensor(COLORS[color]), torch.tensor(BACKGROUNDS[background])) > 0.57
