"""Scores block by block after a switch of the prompt, against the pipeline's own stream and plain slices."""

import json
import math

import pytest
import torch

from astrolabe_diffusers import CausalWanPipeline
from astrolabe_diffusers.cli.evaluate import main
from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.evaluation.config import LoraEvaluationConfig
from astrolabe_diffusers.rollout.seeds import seeded_generator
from astrolabe_diffusers.training.adapter_files import save_adapter
from tests.processes import Torchrun
from tests.training.helpers import policy_pipeline


SCENES = [
    "a red circle moves left on a black background [1.5s] | a green cross moves up on a white background",
    "a blue square moves down on a gray background [0.75s] | a red cross moves up on a black background [0.75s] "
    "| a green circle moves left on a white background",
]
SIZE = {"height": 16, "width": 32, "num_frames": 45}


def fits(videos, prompts, metadata):
    """Depends on frames and text."""
    return videos.mean((1, 2, 3, 4)).cpu() * torch.tensor([float(len(prompt)) for prompt in prompts])


FITS = "tests.evaluation.test_switches:fits"


def run(model_folder, folder, **values):
    settings = {"model": model_folder, "output_dir": folder, "rewards": f"{FITS},flicker", "num_videos": 1, **SIZE}
    settings |= {"seeds": 2, "batch_size": 3, "mixed_precision": "no", **values}
    main([part for name, value in settings.items() for part in (f"--{name}", str(value))])
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "scenes.txt"
    file.write_text("\n".join(SCENES))
    return file


def stream(pipe, texts, starts, transition, key):
    """Blocks of frames `(F, 3, H, W)`."""
    generator, blocks = [seeded_generator(*key)], []
    with pipe.stream(texts[0], generator=generator, output_type="pt", **SIZE) as stream:
        for block in range(4):
            if block in starts:
                stream.set_prompt(texts[starts.index(block) + 1], transition)
            blocks.append(next(stream)[0])
    return blocks


def test_scores_of_scenes_are_those_of_the_stream_s_blocks(model_folder, prompts, tmp_path):
    """Blocks are 0.75 s long, the first one counted as long: the second scene of one begins with block 2, the others'
    with 1 and 2."""
    results = run(model_folder, tmp_path, prompts=prompts, transitions="recache,cut", switch_prompts="scenes")
    pipe = CausalWanPipeline.from_pretrained(model_folder)
    pipe.set_progress_bar_config(disable=True)
    texts = [[part.partition(" [")[0].strip() for part in text.split("|")] for text in SCENES]
    starts, number = [[2], [1, 2]], 0
    column = results["columns"]["base"]
    assert [video["transition"] for video in results["videos"]] == ["recache"] * 4 + ["cut"] * 4
    for transition in ("recache", "cut"):
        blocks_of = column["after_switch"][transition][FITS]
        assert [entry["block"] for entry in blocks_of["new"]] == [1, 2]
        for seed in range(2):
            for i in range(2):
                key = ("sample", "held-out", transition, i, seed)
                blocks = stream(pipe, texts[i], starts[i], transition, key)
                assert [len(block) for block in blocks] == [9, 12, 12, 12]
                of_block = {1: {"new": [], "old": []}, 2: {"new": [], "old": []}}
                whole = 0
                for block, frames in enumerate(blocks):
                    scene = sum(start <= block for start in starts[i])
                    whole += frames.mean((1, 2, 3)).sum() * len(texts[i][scene]) / 45
                    if scene:
                        place = block - starts[i][scene - 1] + 1
                        of_block[place]["new"].append(frames.mean() * len(texts[i][scene]))
                        of_block[place]["old"].append(frames.mean() * len(texts[i][scene - 1]))
                row = 2 * seed + i
                for which in ("new", "old"):
                    for entry in blocks_of[which]:
                        expected = torch.stack(of_block[entry["block"]][which]).mean().item()
                        assert entry["scores"][row] == pytest.approx(expected, abs=1e-4)
                assert column["scores"][FITS][number] == pytest.approx(float(whole), abs=1e-4)
                number += 1
        entry = blocks_of["new"][0]
        values = torch.tensor(entry["scores"], dtype=torch.float64)
        assert entry["mean"] == pytest.approx(values.mean().item())
        assert entry["half_width_95"] == pytest.approx(1.96 * values.std().item() / math.sqrt(4))
        assert entry["change"] == {"change": 0.0, "half_width_95": 0.0}
    # What does not look at the prompt has no old one.
    assert column["after_switch"]["cut"]["flicker"].keys() == {"new"}
    assert not any("after_switch" in score for score in column["mean"])
    table = (tmp_path / "table.md").read_text()
    assert table.count("\n| recache") == 2 * 2 + 2 and f"{entry['mean']:.4f}" in table
    assert (tmp_path / "after_switch.png").stat().st_size > 10_000


def test_pairs_change_in_the_middle(model_folder, tmp_path):
    results = run(model_folder, tmp_path, transitions="roll", transition_blocks=2, num_prompts=2, seeds=1)
    (first, second), base = results["videos"], results["columns"]["base"]["after_switch"]["roll"]
    assert first["scenes"] == second["scenes"][::-1]
    assert first["prompt"] == " | ".join(first["scenes"])
    assert [entry["block"] for entry in base[FITS]["new"]] == [1, 2]


def test_one_video_has_no_interval(model_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text(SCENES[0])
    folder, prompts = tmp_path / "eval", {"prompts": tmp_path / "prompts.txt", "switch_prompts": "scenes"}
    save_adapter(policy_pipeline(num_layers=1, randomize=False).transformer, tmp_path / "zero")
    values = {"transitions": "roll", "seeds": 1, "num_videos": 0, "column": f"zero={tmp_path / 'zero'}"}
    run(model_folder, folder, **prompts | values)
    columns = json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)["columns"]
    (entry, *_) = columns["zero"]["after_switch"]["roll"][FITS]["new"]
    assert entry["half_width_95"] is None and entry["change"] == {"change": 0, "half_width_95": None}
    assert columns["zero"]["change"][FITS] == {"change": 0, "half_width_95": None}
    table = (folder / "table.md").read_text()
    assert "nan" not in table and "\u00b1" not in table and "+0.0000 |" in table
    assert (folder / "after_switch.png").is_file() and (folder / "scores.png").is_file()


def test_two_processes_are_one(model_folder, prompts, tmp_path):
    values = {"prompts": prompts, "transitions": "roll,cut", "switch_prompts": "scenes", "num_videos": 0}
    run(model_folder, tmp_path / "one", batch_size=1, **values)
    settings = {"model": model_folder, "output_dir": tmp_path / "two", "rewards": f"{FITS},flicker", **SIZE, **values}
    settings |= {"seeds": 2, "batch_size": 1, "mixed_precision": "no"}
    arguments = [part for name, value in settings.items() for part in (f"--{name}", value)]
    code, output = Torchrun("examples/evaluate.py", *arguments).finish()
    assert code == 0 and "2 processes on cpu" in output, output
    texts = [(tmp_path / name / "results.json").read_text() for name in ("one", "two")]
    one, two = (json.loads(text)["columns"]["base"] for text in texts)
    assert one["scores"].keys() == two["scores"].keys()
    for name, scores in one["scores"].items():
        assert two["scores"][name] == pytest.approx(scores, abs=1e-5)
    for transition, rewards in one["after_switch"].items():
        for reward, texts in rewards.items():
            for which, entries in texts.items():
                others = two["after_switch"][transition][reward][which]
                for entry, other in zip(entries, others, strict=True):
                    assert other["block"] == entry["block"]
                    assert other["scores"] == pytest.approx(entry["scores"], abs=1e-5, nan_ok=True)


def test_plain_prompts_stay_plain(model_folder, prompts, tmp_path):
    results = run(model_folder, tmp_path, prompts=prompts, num_videos=0, seeds=1)
    assert [video["prompt"] for video in results["videos"]] == SCENES
    assert "after_switch" not in results["columns"]["base"] and not (tmp_path / "after_switch.png").exists()


def test_mistakes():
    with pytest.raises(UserError, match="transitions: 'blend' is none of roll, recache, flush, rope_cut, cut"):
        LoraEvaluationConfig(transitions=["blend"])
