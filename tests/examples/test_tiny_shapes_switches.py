"""The prompts and the arithmetic of the experiments with switches."""

import sys
from dataclasses import asdict
from math import nan
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from astrolabe_diffusers import TINY_SHAPES
from astrolabe_diffusers.cli.train import parse_args
from astrolabe_diffusers.evaluation.switches import after_switch
from astrolabe_diffusers.files.text import to_json
from astrolabe_diffusers.pipelines.scene_prompt import parse_scenes
from astrolabe_diffusers.reporting.comparison import Evaluation
from astrolabe_diffusers.rewards.metrics.tiny_shapes_world import COLORS, DIRECTIONS, SHAPES, parse_caption
from astrolabe_diffusers.rollout.config import SwitchConfig
from astrolabe_diffusers.rollout.prompts import Prompt
from astrolabe_diffusers.rollout.samples import eval_samples, eval_switches


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


def test_what_an_evaluation_writes_is_read_by_kind_pair_and_block(switches, prompts, tmp_path):
    """The samples are the package's own; a score says whose it is, by transition, row in the file and block."""
    pipe = SimpleNamespace(
        transformer=SimpleNamespace(config=SimpleNamespace(num_frames_per_block=3)),
        seconds_per_block=0.75,
        num_blocks=lambda num_frames: (num_frames + 3) // 12,
    )
    for kind, settings in switches.EVALUATIONS.items():
        texts = [Prompt(line) for line in lines(prompts, kind, "test")]
        samples = eval_samples(texts, settings["seeds"])
        rewards, scores = settings["rewards"].split(","), {}
        if "transitions" in settings:
            config = SwitchConfig(transitions=settings["transitions"].split(","), switch_prompts="scenes")
            samples = eval_switches(samples, config, pipe, settings["num_frames"])
        for position, name in enumerate(rewards):
            scores[name] = [sample.group + 1000.0 * sample.key[-1] for sample in samples]
            if "transitions" in settings:
                blocks = settings["num_frames"] // 12 + 1
                for block in range(1, blocks):
                    scores[f"after_switch/new/{block}/{name}"] = [
                        value(position, sample, block) if sample.scenes[1].switch.frame // 3 + block <= blocks else nan
                        for sample in samples
                    ]
        evaluation = Evaluation(None, {name: values for name, values in scores.items() if not np.isnan(values).all()})
        column = {"scores": scores}
        if "transitions" in settings:
            column["after_switch"] = after_switch(samples, evaluation, evaluation)
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "results.json").write_text(to_json({"columns": {"lora": column}}))
    judged = switches.Judged.read(tmp_path, "lora")
    rows = torch.arange(216.0).view(9, 24)
    for number, transition in enumerate(("roll", "recache")):
        expected = 1e4 * number + 10 * rows[..., None] + torch.arange(1.0, 4)
        torch.testing.assert_close(judged.after[transition], expected)
        torch.testing.assert_close(judged.cut[transition], expected[..., 0] + 1e5)
    torch.testing.assert_close(judged.new, 10 * rows[..., None] + torch.arange(1.0, 4))
    torch.testing.assert_close(judged.single, torch.arange(159.0) + 500)
    torch.testing.assert_close(judged.late, 10 * torch.arange(16.0)[:, None] + torch.arange(1.0, 41))
    torch.testing.assert_close(judged.minute, 10 * torch.arange(16.0, 32)[:, None] + torch.arange(1.0, 80))


def value(reward, sample, block):
    transition = ("roll", "recache").index(sample.scenes[1].switch.transition)
    return 1e5 * reward + 1e4 * transition + 10.0 * sample.group + block


def test_the_recipe_is_what_was_measured(switches, capsys):
    """Up to the prompts, and what is only looked at; 12 latent frames are 45."""
    settings = {"config": "tiny_shapes", **switches.SETTINGS["roll or recache, twice the KL"]}
    measured = asdict(parse_args([word for name, value in settings.items() for word in (f"--{name}", str(value))]))
    recipe = asdict(parse_args(["--config", "tiny_shapes_switch"]))
    differ = {name for name in recipe if recipe[name] != measured[name]}
    assert (recipe["num_frames"], measured["sample_frames"]) == (45, 12)
    differ -= {"num_frames", "sample_frames"}
    assert {name for name in differ if "eval" not in name} == {"prompts", "switch_prompts", "output_dir"}


def test_tables_have_a_row_for_each_setting(switches, capsys):
    generator = torch.Generator().manual_seed(0)

    def judged():
        def drawn(*shape):
            return torch.rand(shape, generator=generator)

        after, cut = ({name: drawn(9, 24, *rest) for name in ("roll", "recache")} for rest in ((3,), ()))
        return switches.Judged(after, drawn(9, 24, 3), cut, drawn(159), drawn(16, 79), drawn(16, 40))

    base, runs = judged(), [judged() for _ in range(3)]
    switches.print_tables({"mine": [{"base": base, "lora": run} for run in runs]}, "test")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    won = torch.stack([(run.after["roll"] - base.after["roll"])[2, :, 0].mean() for run in runs])
    gap = (base.new - base.after["roll"])[2, :, 0].mean()
    (closed,) = (row[5] for row in rows if row[:2] == ["mine", "roll"])
    assert closed.startswith(f"{(won / gap).mean():+.3f} ")
    tens = [f"{run:.3f}" for run in torch.stack([run.late.mean(0)[:39].view(3, 13).mean(1) for run in runs]).mean(0)]
    assert ["mine", " ".join(tens)] in rows
    change = torch.stack([(run.single - base.single)[64:128].mean() for run in runs]).mean()
    assert any(row[0] == "mine" and len(row) == 4 and row[2].startswith(f"{change:+.3f} ") for row in rows)
