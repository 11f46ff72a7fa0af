"""The training clips of the tiny_shapes recipe."""

import importlib.util
import itertools
import random
from pathlib import Path

import pytest
import torch

from astrolabe_diffusers.rewards import get_reward
from astrolabe_diffusers.rewards.metrics.tiny_shapes_world import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    SHAPES,
    parse_caption,
)
from tests.rewards.drawn_clips import draw_scene, random_scene


_PATH = Path(__file__).parents[2] / "examples" / "tiny_shapes" / "data.py"
_SPEC = importlib.util.spec_from_file_location("tiny_shapes_data", _PATH)
data = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(data)

NAMES = (tuple(COLORS), SHAPES, tuple(DIRECTIONS))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draws(seed=0):
    return data.Draws(generator(seed), "cpu")


def row(scene):
    """The ten indices of a scene."""
    indices = [values.index(name) for thing in scene.objects for values, name in zip(NAMES, thing)]
    return [*indices, *[-1] * (9 - len(indices)), tuple(BACKGROUNDS).index(scene.background)]


def num_objects(scenes):
    return (scenes[:, :-1:3] >= 0).sum(1)


def match(videos, scenes):
    return get_reward("tiny_shapes_prompt_match").score(videos, data.captions(scenes)).scores


def test_training_scenes_are_scenes_in_the_shares_of_their_numbers_of_objects():
    scenes = data.training_scenes(6000, draws())
    # Parsing refuses a colour that comes twice, be it the background's.
    assert [row(parse_caption(text)) for text in data.captions(scenes)] == scenes.tolist()
    shares = num_objects(scenes).bincount() / len(scenes)
    torch.testing.assert_close(shares, torch.tensor([0, *data.OBJECT_SHARES]), atol=0.02, rtol=0)
    for values, columns in ((COLORS, (0, 3, 6)), (SHAPES, (1, 4, 7)), (DIRECTIONS, (2, 5, 8)), (BACKGROUNDS, (9,))):
        found = torch.cat([scenes[:, c] for c in columns])
        found = found[found >= 0].bincount(minlength=len(values))
        assert found.min() > 0.6 * found.max()


def test_every_scene_of_one_object_once():
    scenes = data.single_object_scenes()
    texts = data.captions(scenes)
    assert len(texts) == len(set(texts)) == 368
    assert [row(parse_caption(text)) for text in texts] == scenes.tolist()


def test_a_sixth_is_held_out_and_every_pair_of_values_is_left():
    scenes = data.single_object_scenes()
    unseen = data.held_out(scenes)
    assert unseen.float().mean() == pytest.approx(1 / 6, abs=0.01)
    for a, b in itertools.combinations((0, 1, 2, 9), 2):
        pairs = scenes[:, [a, b]]
        assert pairs[~unseen].unique(dim=0).tolist() == pairs.unique(dim=0).tolist()
    for count in (2, 3):
        scenes = data.draw_scenes(6000, draws(), torch.full((6000,), count))
        assert (num_objects(scenes) == count).all()
        assert data.held_out(scenes).float().mean() == pytest.approx(1 / 6, abs=0.02)


def test_a_batch_holds_nothing_that_is_held_out():
    """Nor does what a clip turns into, be it another scene or one that is an edit away."""
    batch = data.sample_batch(60, 13, generator(), switch_prob=1.0)
    assert not data.held_out(batch["before"]).any() and not data.held_out(batch["after"]).any()
    scenes = data.training_scenes(6000, draws())
    assert not data.held_out(data.edited_scenes(scenes, draws(1))).any()


def test_an_edit_is_another_value_or_an_object_more_or_less():
    scenes = data.training_scenes(6000, draws())
    edited = data.edited_scenes(scenes, draws(1))
    assert [row(parse_caption(text)) for text in data.captions(edited)] == edited.tolist()
    more = num_objects(edited) - num_objects(scenes)
    kept = torch.minimum(num_objects(edited), num_objects(scenes))
    same = edited == scenes
    # What both have stays, in its place.
    common = (same[:, :-1].unflatten(1, (3, 3)).all(2) | (torch.arange(3) >= kept[:, None])).all(1) & same[:, -1]
    kinds = {
        "value": (more == 0) & (same.sum(1) == 9),
        "more": (more == 1) & common,
        "less": (more == -1) & common,
    }
    shares = {name: kind.float().mean().item() for name, kind in kinds.items()}
    assert min(shares.values()) > 0.1 and 0.5 < sum(shares.values()), shares
    # Any column can be the one that changes.
    changed = (~same[kinds["value"]]).sum(0)
    assert changed.min() > 0


@pytest.mark.parametrize("count", [1, 2, 3])
def test_render_draws_what_the_scene_says_the_first_object_in_front(count):
    source = random.Random(count)
    # On the way to one place: they hide each other.
    drawn = [random_scene(source, count, crossing=count > 1) for _ in range(4)]
    scenes = torch.tensor([row(scene) for scene, _ in drawn])[:, None].expand(-1, 9, -1)
    padding = [{"start": (0.0, 0.0), "radius": 1.0, "speed": 1.0}] * (3 - count)
    motions = [[*motion, *padding] for _, motion in drawn]
    start, radius, speed = (torch.tensor([[m[k] for m in ms] for ms in motions]) for k in ("start", "radius", "speed"))
    videos = data.render(scenes, start[:, None] + data.paths(scenes, speed), radius)
    assert videos.shape == (4, 9, 3, 96, 96) and videos.min() >= 0 and videos.max() <= 1
    for video, (scene, motion) in zip(videos, drawn):
        assert (video - draw_scene(scene, motion, frames=9)).abs().mean() < 0.003


def test_clips_fit_their_own_captions():
    batch = data.sample_batch(32, 13, generator())
    assert batch["videos"].shape == (32, 13, 3, 96, 96)
    assert torch.equal(batch["before"], batch["after"]) and not batch["switch_frame"].any()
    assert match(batch["videos"], batch["before"]).min() > 0.97


def test_a_switch_turns_one_scene_into_another():
    batch = data.sample_batch(24, 25, generator(), switch_prob=0.6)
    switch = batch["switch_frame"]
    assert set(switch.tolist()) == {0, 9, 21} and 8 < (switch > 0).sum() < 21
    assert torch.equal(batch["before"][switch == 0], batch["after"][switch == 0])
    assert match(batch["videos"][:, :9], batch["before"]).min() > 0.97
    early = switch == 9
    assert match(batch["videos"][early, 9:], batch["after"][early]).min() > 0.97
    # Up to the last frame before the switch.
    late = switch == 21
    assert match(batch["videos"][late, 9:21], batch["before"][late]).min() > 0.97
    assert match(batch["videos"][late, 21:], batch["after"][late]).min() > 0.97


def object_masks(frames):
    """[N, 96, 96]: what is not background, which is most of each frame [N, 3, 96, 96]."""
    background = frames.flatten(2).median(2).values[..., None, None]
    return ((frames - background).abs().sum(1) > 0.3).float()


def around_switches(monkeypatch, number_of_objects, hard_share):
    """Masks of the frames just before and just after the switch."""
    shares = [0.0, 0.0, 0.0]
    shares[number_of_objects - 1] = 1.0
    monkeypatch.setattr(data, "OBJECT_SHARES", shares)
    monkeypatch.setattr(data, "EDIT_SHARE", 0.0)
    monkeypatch.setattr(data, "HARD_SHARE", hard_share)
    videos = data.sample_batch(24, 13, generator(), switch_prob=1.0)["videos"]
    return object_masks(videos[:, 8]), object_masks(videos[:, 9])


@pytest.mark.parametrize("hard", [False, True])
def test_at_a_switch_the_object_goes_on_where_it_is_or_jumps(monkeypatch, hard):
    angle = torch.arange(96) * (2 * torch.pi / 96)
    phases = []
    for mask in around_switches(monkeypatch, 1, hard_share=float(hard)):
        profiles = torch.stack([mask.sum(1), mask.sum(2)])
        phases.append(torch.atan2(profiles @ angle.sin(), profiles @ angle.cos()))
    moved = (phases[1] - phases[0] + torch.pi).remainder(2 * torch.pi) - torch.pi
    distance = (moved * 96 / (2 * torch.pi)).norm(dim=0)
    assert (distance > 8).float().mean() > 0.8 if hard else distance.max() < 4


@pytest.mark.parametrize("hard", [False, True])
def test_three_objects_go_on_or_jump_together(monkeypatch, hard):
    before, after = around_switches(monkeypatch, 3, hard_share=float(hard))
    common = (before * after).sum((1, 2)) / torch.maximum(before, after).sum((1, 2))
    assert common.mean() < 0.3 if hard else common.min() > 0.4


def test_objects_begin_apart():
    scenes = data.training_scenes(200, draws())
    there = scenes[:, None, :-1:3] >= 0
    places = data.places_apart(draws(1), torch.zeros(200, 1, 3, 2), there)
    assert places.min() >= 0 and places.max() <= 96 and places.std() > 20
    # The nearest of the nine copies of a plane whose borders meet.
    copies = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2)) * 96
    for count, least in ((2, 36), (3, 26)):
        chosen = places[num_objects(scenes) == count, :count]
        for a, b in itertools.combinations(range(count), 2):
            distance = (chosen[:, a, None] - chosen[:, b, None] + copies).norm(dim=-1).amin(1)
            assert (distance > least).float().mean() > 0.9


def test_the_same_generator_gives_the_same_batch():
    first, again = (data.sample_batch(4, 13, generator(3), switch_prob=0.5) for _ in range(2))
    other = data.sample_batch(4, 13, generator(4), switch_prob=0.5)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["videos"], other["videos"])


def test_switch_frames_are_first_frames_of_blocks():
    assert data.switch_frames(9) == []
    assert data.switch_frames(21) == [9]
    # By decoding lengths: the first latent frame gives one pixel frame, each other one four.
    lengths = [1] + [4] * 11
    assert data.switch_frames(sum(lengths)) == [sum(lengths[: 3 * block]) for block in (1, 2, 3)]


def test_a_switch_needs_a_second_block():
    with pytest.raises(ValueError, match="9 frames are a single block"):
        data.sample_batch(2, 9, generator(), switch_prob=0.5)


def test_write_prompts(tmp_path):
    data.write_prompts(tmp_path / "prompts")
    sizes = {".": (3, 320, 64), "two_objects": (2, 320, 64), "one_object": (1, 306, 31)}
    for folder, (count, num_train, num_unseen) in sizes.items():
        lines = {
            split: (tmp_path / "prompts" / folder / f"{split}.txt").read_text().splitlines()
            for split in ("train", "validation", "test")
        }
        assert [len(texts) for texts in lines.values()] == [num_train, num_unseen, num_unseen]
        assert len(set().union(*lines.values())) == num_train + 2 * num_unseen
        for split, texts in lines.items():
            scenes = torch.tensor([row(parse_caption(text)) for text in texts])
            assert data.captions(scenes) == texts
            # Half of what the quick start trains on is easier than what it is judged on.
            mixed = (folder, split) == (".", "train")
            expected = [80, 80, 160] if mixed else [0] * (count - 1) + [len(texts)]
            assert num_objects(scenes).bincount()[1:].tolist() == expected
            assert (data.held_out(scenes) == (split != "train")).all()
