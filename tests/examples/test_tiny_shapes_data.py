"""The training clips of the tiny_shapes recipe."""

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch

from astrolabe_diffusers.rewards import get_reward
from astrolabe_diffusers.rewards.metrics.tiny_shapes import ATTRIBUTES, parse_caption
from tests.rewards.drawn_clips import draw_clip


_PATH = Path(__file__).parents[2] / "examples" / "tiny_shapes" / "data.py"
_SPEC = importlib.util.spec_from_file_location("tiny_shapes_data", _PATH)
data = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(data)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def parts(videos, captions):
    return get_reward("tiny_shapes_prompt_match").score(videos, captions).info


def test_all_combinations_once_none_invisible():
    captions = data.captions(data.combinations())
    assert len(captions) == len(set(captions)) == 368 == len(data.combinations())
    for caption, row in zip(captions, data.combinations().tolist()):
        names = parse_caption(caption)
        assert [values.index(names[name]) for name, values in ATTRIBUTES.items()] == row
        assert names["color"] != names["background"]


def test_held_out_sixth_leaves_every_pair_of_values_in_training():
    train, test = data.split("train"), data.split("test")
    assert sorted(train.tolist() + test.tolist()) == data.combinations().tolist()
    assert len(test) / 368 == pytest.approx(1 / 6, abs=0.01)
    seen = train.tolist()
    for a, b in itertools.combinations(range(4), 2):
        assert {(row[a], row[b]) for row in seen} == {(row[a], row[b]) for row in data.combinations().tolist()}
    for axis, count in enumerate(len(values) for values in ATTRIBUTES.values()):
        held_out = test[:, axis].bincount(minlength=count)
        assert held_out.min() >= 0.5 * held_out.max() and held_out.min() > 0


def test_render_draws_what_the_attributes_say():
    scenes = [("red", "triangle", "white", "left"), ("orange", "cross", "blue", "down")]
    attributes = torch.tensor([[v.index(n) for v, n in zip(ATTRIBUTES.values(), names)] for names in scenes])
    start = torch.tensor([[5.0, 30.0], [40.0, 60.0]])
    radius, speed = torch.tensor([9.0, 12.0]), torch.tensor([1.3, 2.2])
    videos = data.render(attributes, start, radius, speed, 9)
    assert videos.shape == (2, 9, 3, 64, 64) and videos.min() >= 0 and videos.max() <= 1
    for b, names in enumerate(scenes):
        drawn = draw_clip(*names, frames=9, start=start[b].tolist(), radius=radius[b].item(), speed=speed[b].item())
        assert (videos[b] - drawn).abs().mean() < 0.003


def test_clips_fit_their_own_captions_in_every_part():
    batch = data.sample_batch(96, 21, generator())
    assert batch["videos"].shape == (96, 21, 3, 64, 64)
    assert torch.equal(batch["caption_attributes"], batch["attributes"])
    for name, values in parts(batch["videos"], data.captions(batch["caption_attributes"])).items():
        assert values.min() >= 0.95, name


def test_a_batch_holds_only_the_training_split():
    batch = data.sample_batch(400, 1, generator())
    assert set(data.captions(batch["attributes"])) <= set(data.captions(data.split("train")))


def test_the_same_generator_gives_the_same_batch():
    first, again = (data.sample_batch(4, 21, generator(3), caption_noise=0.3, switch_prob=0.5) for _ in range(2))
    other = data.sample_batch(4, 21, generator(4), caption_noise=0.3, switch_prob=0.5)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["videos"], other["videos"])


def test_caption_noise_replaces_each_attribute_on_its_own_and_says_only_training_captions():
    batch = data.sample_batch(6000, 1, generator(), caption_noise=0.15)
    assert set(data.captions(batch["caption_attributes"])) <= set(data.captions(data.split("train")))
    wrong = batch["caption_attributes"] != batch["attributes"]
    torch.testing.assert_close(wrong.float().mean(0), torch.full((4,), 0.15), atol=0.015, rtol=0)
    assert (wrong[:, 0] & wrong[:, 3]).float().mean() == pytest.approx(0.15**2, abs=0.006)
    for axis, count in enumerate(len(values) for values in ATTRIBUTES.values()):
        replaced = batch["caption_attributes"][wrong[:, axis], axis].bincount(minlength=count)
        assert replaced.min() > 0.4 * replaced.float().mean()


def test_switch_frames_are_first_frames_of_blocks():
    assert data.switch_frames(21) == [9] == [4 * 3 * 1 - 3]
    assert data.switch_frames(45) == [9, 21, 33]
    assert data.switch_frames(9) == []
    # By decoding lengths: the first latent frame gives one pixel frame, each other one four.
    lengths = [1] + [4] * 11
    assert data.switch_frames(sum(lengths)) == [sum(lengths[: 3 * block]) for block in (1, 2, 3)]


def test_a_switch_changes_the_scene_and_the_object_goes_on_from_where_it_is():
    batch = data.sample_batch(64, 33, generator(), switch_prob=0.5)
    switched = batch["switch_frame"] > 0
    assert set(batch["switch_frame"].tolist()) == {0, 9, 21} and 20 < switched.sum() < 44
    assert torch.equal(batch["before"][~switched], batch["attributes"][~switched])

    late = batch["videos"][:, 21:]
    for name, values in parts(late, data.captions(batch["caption_attributes"])).items():
        assert values.min() > 0.95, name
    for name, values in parts(batch["videos"][:, :9], data.captions(batch["before"])).items():
        assert values.min() > 0.95, name

    index = switched.nonzero()[0].item()
    frame = batch["switch_frame"][index].item()
    last, first = batch["videos"][index, frame - 1], batch["videos"][index, frame]
    centers = []
    for picture in (last, first):
        mask = (picture - picture.flatten(1).median(1).values[:, None, None]).abs().sum(0) > 0.3
        angle = torch.arange(64) * (2 * torch.pi / 64)
        profiles = torch.stack([mask.sum(0), mask.sum(1)]).float()
        centers.append(torch.atan2(profiles @ angle.sin(), profiles @ angle.cos()))
    moved = (centers[1] - centers[0] + torch.pi).remainder(2 * torch.pi) - torch.pi
    assert (moved * 64 / (2 * torch.pi)).norm() < 4
    assert not torch.allclose(last, first, atol=0.3)


def test_a_switch_needs_a_second_block():
    with pytest.raises(ValueError, match="9 frames are a single block"):
        data.sample_batch(2, 9, generator(), switch_prob=0.5)


def test_write_prompts(tmp_path):
    data.write_prompts(tmp_path / "prompts")
    for split in ("train", "test"):
        lines = (tmp_path / "prompts" / f"{split}.txt").read_text().splitlines()
        assert sorted(lines) == sorted(data.captions(data.split(split)))
        first = [parse_caption(line) for line in lines[:16]]
        for name, values in ATTRIBUTES.items():
            assert len({names[name] for names in first}) >= len(values) - 1
