"""The prompts and the arithmetic of the experiments with switches."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from astrolabe_diffusers import TINY_SHAPES
from astrolabe_diffusers.pipelines.scene_prompt import parse_scenes
from astrolabe_diffusers.rewards.metrics.tiny_shapes_world import COLORS, DIRECTIONS, SHAPES, parse_caption


FOLDER = Path(__file__).parents[2] / "examples" / "tiny_shapes"
SIZES = {"train": 64, "validation": 24, "test": 24}


@pytest.fixture(scope="module")
def switches():
    """The example, which imports its neighbours by their names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import switch_experiments

        yield switch_experiments
        for name in ("switch_experiments", "experiments", "data"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def prompts(switches, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    switches.write_prompts(folder)
    return folder


def lines(folder, name, split):
    return (folder / name / f"{split}.txt").read_text().splitlines()


def pairs(folder, split):
    """Scenes before and after, by kind."""
    parsed = [[parse_caption(scene.text) for scene in parse_scenes(line)] for line in lines(folder, "scenes", split)]
    return [parsed[i : i + SIZES[split]] for i in range(0, len(parsed), SIZES[split])]


def number(scene):
    """As the recipe counts them: a multiple of six is held out."""
    backgrounds = ("black", "white", "gray", "blue")
    colors, directions = list(COLORS), list(DIRECTIONS)
    objects = (colors.index(o.color) + SHAPES.index(o.shape) + directions.index(o.direction) for o in scene.objects)
    return sum(objects) + backgrounds.index(scene.background)


def changed(before, after):
    """Which of an object's three values differ anywhere."""
    assert before.background == after.background and len(before.objects) == len(after.objects)
    same = [[a == b for a, b in zip(*both)] for both in zip(before.objects, after.objects)]
    assert all(len(set(column)) == 1 for column in zip(*same))
    return tuple(not column[0] for column in zip(*same))


OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


@pytest.mark.parametrize("split", SIZES)
def test_switches_are_of_their_kinds(switches, prompts, split):
    kinds = dict(zip(switches.KINDS, pairs(prompts, split), strict=True))
    for kind, of_kind in kinds.items():
        assert len(of_kind) == SIZES[split]
        count = 2 if kind in ("two reversed", "two, other shapes", "two, colours in turn") else 3
        assert {len(after.objects) for _, after in of_kind} == {count}
    for count, kind in ((1, "one to three"), (2, "two to three"), (3, "three to three")):
        assert {len(before.objects) for before, _ in kinds[kind]} == {count}
        assert all(before != after for before, after in kinds[kind])
    for count in ("two", "three"):
        assert {changed(*pair) for pair in kinds[f"{count} reversed"]} == {(False, False, True)}
        for before, after in kinds[f"{count} reversed"]:
            assert [OPPOSITE[o.direction] for o in before.objects] == [o.direction for o in after.objects]
        assert {changed(*pair) for pair in kinds[f"{count}, other shapes"]} == {(False, True, False)}
        assert {changed(*pair) for pair in kinds[f"{count}, colours in turn"]} == {(True, False, False)}
        for before, after in kinds[f"{count}, colours in turn"]:
            assert {o.color for o in before.objects} == {o.color for o in after.objects}


def test_training_and_judging_have_other_scenes(prompts):
    after = {split: [pair[1] for kind in pairs(prompts, split) for pair in kind] for split in SIZES}
    assert all(number(scene) % 6 for scene in after["train"])
    assert all(number(before) % 6 for kind in pairs(prompts, "train") for before, _ in kind)
    assert not any(number(scene) % 6 for split in ("validation", "test") for scene in after[split])
    assert not set(after["validation"]) & set(after["test"])


def test_the_same_captions_alone_and_unchanged(prompts):
    for split in SIZES:
        new = [parse_scenes(line)[1].text for line in lines(prompts, "scenes", split)]
        assert lines(prompts, "captions", split) == new
        unchanged = [[scene.text for scene in parse_scenes(line)] for line in lines(prompts, "unchanged", split)]
        assert unchanged == [[text, text] for text in new]
        minute = [parse_scenes(line) for line in lines(prompts, "minute", split)]
        assert [scenes[0].seconds for scenes in minute] == [30] * 16 + [0.75] * 16
        assert [scenes[1].text for scenes in minute[:16]] == [scenes[1].text for scenes in minute[16:]]
    beside = [(Path(TINY_SHAPES) / "prompts" / name / "test.txt").read_text() for name in (".", "two_objects")]
    assert lines(prompts, "single", "test")[:128] == "".join(beside).splitlines()


def test_a_share_and_its_intervals(switches):
    generator = torch.Generator().manual_seed(0)
    gap = 0.2 + 0.1 * torch.randn(240, generator=generator)
    won = 0.5 * gap + 0.05 * torch.randn(3, 240, generator=generator) + torch.tensor([[-0.01], [0.0], [0.02]])
    shares = (won.mean(1) / gap.mean()).tolist()
    text = switches.share(won, gap)
    assert text.endswith(f"({shares[0]:+.3f} {shares[1]:+.3f} {shares[2]:+.3f})")
    mean, over_seeds, over_pairs = (float(part) for part in text.replace("±", "").split()[:3])
    # Student's t of two degrees of freedom has its quantiles in closed form.
    quantile = 0.95 / (2 * 0.975 * 0.025) ** 0.5
    assert mean == pytest.approx(np.mean(shares), abs=1e-3)
    assert over_seeds == pytest.approx(quantile * np.std(shares, ddof=1) / 3**0.5, abs=2e-3)
    # Pairs drawn anew, with all that is of them.
    rows = np.random.default_rng(0).integers(240, size=(4000, 240))
    drawn = won.mean(0).numpy()[rows].mean(1) / gap.numpy()[rows].mean(1)
    assert over_pairs == pytest.approx(1.96 * drawn.std(), rel=0.1)
