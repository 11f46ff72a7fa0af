"""Whole evaluations by examples/evaluate.py, in this process, of runs on the random tiny pipeline."""

import contextlib
import io
import json
import math
import statistics
import sys
from pathlib import Path

import imageio.v3
import pytest
import torch
from PIL import Image

from astrolabe_diffusers import TINY_SHAPES
from astrolabe_diffusers.training.adapter_files import save_adapter
from tests.processes import Torchrun
from tests.tiny_pipeline import save_tiny_pipeline
from tests.training.helpers import ALL_REPORTS, full_disk, policy_pipeline, tiny_arguments


EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.append(str(EXAMPLES))
from evaluate import main  # noqa: E402
from train_nft import main as train  # noqa: E402


# Those of module fixtures are drawn.
pytestmark = pytest.mark.usefixtures("no_charts")


BRIGHTNESS, CONTRAST = "tests.training.rewards:brightness", "tests.training.rewards:contrast"
TINY_SHAPES_PROMPTS = Path(TINY_SHAPES) / "prompts"
SCORES = [BRIGHTNESS, *(f"{BRIGHTNESS}/{color}" for color in ("red", "green", "blue")), CONTRAST]


def arguments(model_folder, output_dir, loras=(), **values) -> list[str]:
    """Command line of an evaluation of four videos a column, the held-out ones of a run by `tiny_arguments`."""
    defaults = {
        "model": model_folder,
        "output_dir": output_dir,
        "rewards": f"{BRIGHTNESS},{CONTRAST}",
        "height": 16,
        "width": 32,
        "num_frames": 9,
        "batch_size": 4,
        "num_prompts": 2,
        "seeds": 2,
        "num_videos": 2,
        "mixed_precision": "no",
    }
    pairs = [*(defaults | values).items(), *(("lora", lora) for lora in loras)]
    return [part for name, value in pairs for part in (f"--{name}", str(value))]


def read_results(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


def run_scores(folder, step: int) -> dict:
    """The scores of a run's evaluation at a step."""
    records = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    return next(record["scores"] for record in records if record["step"] == step)


@pytest.fixture(scope="module")
def run(model_folder, tmp_path_factory):
    """Folder of a run of two steps, evaluated at 0, 1 and 2."""
    folder = tmp_path_factory.mktemp("run") / "bright"
    values = ALL_REPORTS | {"num_frames": 9, "report_to": "none"}
    assert train(tiny_arguments(model_folder, folder, **values)) == 0
    return folder


@pytest.fixture(scope="module")
def finished(model_folder, run, tmp_path_factory):
    """Folder of an evaluation of the run and of its first checkpoint."""
    folder = tmp_path_factory.mktemp("evaluation") / "eval"
    loras = [run, f"first={run / 'checkpoints' / 'checkpoint-1'}"]
    assert main(arguments(model_folder, folder, loras)) == 0
    return folder


def test_figures_are_the_runs_own(finished, run):
    columns = read_results(finished)["columns"]
    assert list(columns) == ["base", "bright", "first"]
    for name, step in (("base", 0), ("first", 1), ("bright", 2)):
        expected = run_scores(run, step)
        assert list(columns[name]["scores"]) == SCORES
        assert columns[name]["scores"] == {score: expected[score] for score in SCORES}
    after = json.loads((run / "results.json").read_text())["scores"]
    for score in SCORES:
        assert columns["bright"]["mean"][score] == after[score]["after"]
        assert columns["bright"]["change"][score] == {k: after[score][k] for k in ("change", "half_width_95")}


def test_figures_are_the_runs_own_in_bfloat16(model_folder, tmp_path, own_precision):
    values = dict(max_train_steps=1, eval_seeds=2, num_frames=9, mixed_precision="bf16")
    assert train(tiny_arguments(model_folder, tmp_path / "run", **values)) == 0
    lora = tmp_path / "run"
    assert main(arguments(model_folder, tmp_path / "eval", [lora], num_videos=0, mixed_precision="bf16")) == 0
    columns = read_results(tmp_path / "eval")["columns"]
    for name, step in (("base", 0), ("run", 1)):
        expected = run_scores(lora, step)
        assert columns[name]["scores"] == {score: expected[score] for score in SCORES}


def test_figures_are_the_runs_own_with_its_recipe(tmp_path):
    """A server's model that is trained in the plain loop, as Krea's is, with a window that the videos outgrow."""
    model = save_tiny_pipeline(tmp_path / "model", num_context_frames=3, sigmas=[1.0, 0.5, 0.0])
    recipe = dict(num_context_frames=0, sigmas="1,0.75,0.5,0.25", local_attn_size=6, sink_size=3)
    values = recipe | dict(num_frames=33, eval_num_frames=33, max_train_steps=1)
    assert train(tiny_arguments(model, tmp_path / "run", **values)) == 0
    short = dict(num_frames=33, seeds=1, num_videos=0)
    assert main(arguments(model, tmp_path / "eval", [tmp_path / "run"], **short, **recipe)) == 0
    columns = read_results(tmp_path / "eval")["columns"]
    for name, step in (("base", 0), ("run", 1)):
        expected = run_scores(tmp_path / "run", step)
        assert columns[name]["scores"] == {score: expected[score] for score in SCORES}
    # Its own way is no error here.
    assert main(arguments(model, tmp_path / "own", **short)) == 0
    own = read_results(tmp_path / "own")["columns"]["base"]["scores"][BRIGHTNESS]
    assert own != columns["base"]["scores"][BRIGHTNESS]


def test_held_out_prompts_of_a_single_file(model_folder, tmp_path):
    """A run holds some prompts of a file out; an evaluation of as many prompts of that file takes the same ones."""
    prompts = (model_folder / "prompts" / "train.txt").read_text().splitlines()
    (tmp_path / "all.txt").write_text("\n".join(prompts[:5]))
    values = {"prompts": tmp_path / "all.txt", "num_frames": 9}
    assert train(tiny_arguments(model_folder, tmp_path / "run", **values, max_train_steps=1)) == 0
    short = {"seeds": 1, "num_videos": 0}
    assert main(arguments(model_folder, tmp_path / "eval", [tmp_path / "run"], **values, **short)) == 0
    results = read_results(tmp_path / "eval")
    assert [video["prompt"] for video in results["videos"]] == [prompts[0], prompts[2]]
    assert results["columns"]["run"]["scores"][BRIGHTNESS] == run_scores(tmp_path / "run", 1)[BRIGHTNESS]


def test_prompts_of_a_dataset(model_folder, tmp_path, monkeypatch):
    """In a folder of its repository, with names of its own for split and column."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    prompts = (model_folder / "prompts" / "train.txt").read_text().splitlines()[:2]
    (tmp_path / "set" / "some").mkdir(parents=True)
    (tmp_path / "set" / "some" / "validation.csv").write_text("\n".join(["caption", *prompts]))
    where = {"prompts_data_dir": "some", "prompt_column": "caption", "eval_split": "validation", "num_videos": 0}
    assert main(arguments(model_folder, tmp_path / "eval", prompts=tmp_path / "set", num_frames=9, **where)) == 0
    assert [video["prompt"] for video in read_results(tmp_path / "eval")["videos"]] == 2 * prompts


def test_one_lora_does_not_change_another(finished, model_folder, run, tmp_path):
    loras = [f"first={run / 'checkpoints' / 'checkpoint-1'}", run]
    assert main(arguments(model_folder, tmp_path, loras, num_videos=0)) == 0
    columns, expected = read_results(tmp_path)["columns"], read_results(finished)["columns"]
    assert list(columns) == ["base", "first", "bright"]
    assert all(columns[name]["scores"] == expected[name]["scores"] for name in columns)
    assert len({columns[name]["mean"][BRIGHTNESS] for name in columns}) == 3
    assert not list(tmp_path.glob("side_by_side*")) and not (tmp_path / "videos").exists()


def test_lora_whose_b_is_zero_changes_nothing(model_folder, tmp_path):
    save_adapter(policy_pipeline(num_layers=1, randomize=False).transformer, tmp_path / "zero")
    assert main(arguments(model_folder, tmp_path / "eval", [tmp_path / "zero"], num_videos=0)) == 0
    column = read_results(tmp_path / "eval")["columns"]["zero"]
    assert column["change"] == {score: {"change": 0, "half_width_95": 0} for score in SCORES}


@pytest.fixture(scope="module")
def base_alone(model_folder, tmp_path_factory):
    """Folder of an evaluation without a LoRA, and what it printed."""
    folder = tmp_path_factory.mktemp("base-alone")
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert main(arguments(model_folder, folder)) == 0
    return folder, output.getvalue()


def test_base_alone(base_alone):
    folder, _ = base_alone
    results = read_results(folder)
    assert list(results["columns"]) == ["base"]
    mean = results["columns"]["base"]["mean"][BRIGHTNESS]
    assert (folder / "table.md").read_text().splitlines()[2].split() == ["|", BRIGHTNESS, "|", f"{mean:.4f}", "|"]
    assert (folder / "side_by_side.png").exists()


def test_results_say_what_was_measured(finished, model_folder, run):
    results = read_results(finished)
    settings = results["settings"]
    assert (settings["model"], settings["num_frames"], settings["seeds"]) == (model_folder.name, 9, 2)
    assert results["versions"]["torch"] == torch.__version__
    assert {"diffusers", "astrolabe_diffusers"} <= results["versions"].keys()
    prompts = (model_folder / "prompts" / "test.txt").read_text().splitlines()[::2]
    expected = [{"prompt": prompt, "seed": seed} for seed in (0, 1) for prompt in prompts]
    assert results["videos"] == expected
    assert results["columns"]["bright"]["lora"] == run.name and results["columns"]["base"]["lora"] is None


def test_table_follows_from_the_scores(finished):
    columns = read_results(finished)["columns"]
    lines = (finished / "table.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["", "base", "bright", "change (95 % interval)", "first", "change (95 % interval)"]
    assert set("".join(cells[1])) == {"-", ":"}
    assert [row[0] for row in cells[2:]] == SCORES
    for score, base, *others in cells[2:]:
        before = columns["base"]["scores"][score]
        assert base == f"{statistics.fmean(before):.4f}"
        for name, mean, change in (("bright", *others[:2]), ("first", *others[2:])):
            after = columns[name]["scores"][score]
            differences = [b - a for a, b in zip(before, after, strict=True)]
            center = statistics.fmean(differences)
            half = 1.96 * statistics.stdev(differences) / math.sqrt(len(differences))
            assert mean == f"{statistics.fmean(after):.4f}"
            numbers = [float(number) for number in change.replace("[", "").replace("]", "").replace(",", "").split()]
            assert numbers == pytest.approx([center, center - half, center + half], abs=6e-5)


def test_table_is_printed(base_alone):
    folder, output = base_alone
    assert (folder / "table.md").read_text() in output
    for text in ("4 videos (2 prompts x 2 seeds) of 9 frames of 16x32", "1 process on cpu", f"base: {BRIGHTNESS} "):
        assert text in output
    assert all(str(folder / name) in output for name in ("results.json", "table.md", "scores.png", "side_by_side.mp4"))


def test_videos_and_pictures(finished, run):
    for name in ("base", "bright", "first"):
        folder = finished / "videos" / name
        assert sorted(path.name for path in folder.iterdir()) == ["000.mp4", "001.mp4"]
        assert imageio.v3.imread(folder / "001.mp4").shape == (9, 16, 32, 3)
    # The very video of the run's evaluation.
    expected = (run / "eval_videos" / "step-2" / "000.mp4").read_bytes()
    assert (finished / "videos" / "bright" / "000.mp4").read_bytes() == expected
    # Two groups of three tiles of 128 + 4 by 64 + 4 pixels, filled up to multiples of 16.
    assert imageio.v3.imread(finished / "side_by_side.mp4").shape == (9, 96, 800, 3)
    # Three columns of four frames of 96 + 2 pixels; a row of 48 + 26 for each of two prompts.
    assert Image.open(finished / "side_by_side.png").size == (3 * 4 * 98 + 2 * 16 + 16, 30 + 2 * 74 + 8)
    with Image.open(finished / "scores.png") as chart:
        assert chart.size == (4 * 240 + 10, 62 + 2 * 210)
        assert len(chart.getcolors(1 << 20)) > 10


def test_two_processes_have_the_figures_of_one(finished, model_folder, run, tmp_path):
    """Three batches of two: the second process has one less."""
    two = arguments(model_folder, tmp_path / "two", [run], batch_size=2, seeds=3)
    code, output = Torchrun("examples/evaluate.py", *two).finish()
    assert code == 0 and "2 processes on cpu" in output, output
    assert main(arguments(model_folder, tmp_path / "one", [run], batch_size=2, seeds=3, num_videos=0)) == 0
    two, one = read_results(tmp_path / "two"), read_results(tmp_path / "one")
    assert two["columns"] == one["columns"] and two["videos"] == one["videos"]
    assert (tmp_path / "two" / "table.md").read_text() == (tmp_path / "one" / "table.md").read_text()
    assert sorted(path.name for path in (tmp_path / "two" / "videos" / "bright").iterdir()) == ["000.mp4", "001.mp4"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_frames": 5}, ["num_frames", "at least 9, not 5"]),
        ({"height": 30}, ["height", "multiple of 16"]),
        ({"sigmas": "0.5,1"}, ["`sigmas` must fall"]),
        ({"local_attn_size": 3, "sink_size": 3}, ["window or sink", "at least", "= 6, but is 3"]),
        ({"rewards": "beauty"}, ["unknown reward 'beauty'", "tiny_shapes_prompt_match", "sharpness"]),
        ({"rewards": ""}, ["rewards is empty"]),
        ({"rewards": "tests.training.rewards:always_nan"}, ["always_nan", "nan"]),
        ({"rewards": "tests.training.rewards:broken"}, ["ZeroDivisionError", "a reward that cannot work"]),
        ({"prompts": "nowhere"}, ["nowhere is no prompt file", "cannot be loaded as a dataset"]),
        ({"model": "/no/model"}, ["no folder /no/model/prompts", "give prompts"]),
        ({"model": "/no/model", "prompts": TINY_SHAPES_PROMPTS}, ["cannot load /no/model"]),
        ({"prompts": EXAMPLES.parent / "README.md"}, ["must be a .txt or a .jsonl file"]),
        ({"seeds": 0}, ["seeds must be at least 1"]),
        ({"seeds": "many"}, ["seeds must be a whole number"]),
        ({"mixed_precision": "fp16"}, ["no, bf16"]),
        ({"reward_": "sharpness"}, ["unknown argument --reward_", "--rewards"]),
        ({"lora": "nowhere"}, ["cannot load the LoRA nowhere (nothing here has that name"]),
        ({"lora": "nowhere=0.5"}, ["cannot load the LoRA nowhere (nothing here has that name"]),
        ({"lora": EXAMPLES}, ["cannot load", "holds no LoRA"]),
        ({"column": "runs/a=b"}, ["'runs/a'", "--column NAME=b"]),
        ({"column": "half"}, ["NAME=PATH", "'half'"]),
        ({"lora": "base=a"}, ["'base' is there already", "NAME=a"]),
        ({"lora": "a/run,b/run"}, ["'run' is there already", "NAME=b/run"]),
        ({"lora": "..=a"}, ["'..'", "NAME=a"]),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(model_folder, tmp_path, capsys, values, words):
    assert main(arguments(model_folder, tmp_path / "out", **values)) == 2
    check_one_line(capsys, words)


def check_one_line(capsys, words):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert all(word in lines[0] for word in words), lines[0]


def test_lora_of_another_model_is_found_before_anything_is_generated(model_folder, run, tmp_path, capsys):
    other = policy_pipeline(num_attention_heads=3)
    save_adapter(other.transformer, tmp_path / "other")
    assert main(arguments(model_folder, tmp_path / "out", [run, tmp_path / "other"])) == 2
    check_one_line(capsys, ["another model's", "36 x 36", str(tmp_path / "other")])
    assert not list((tmp_path / "out").iterdir())


def test_output_folder_that_is_a_file(model_folder, tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert main(arguments(model_folder, tmp_path / "out")) == 2
    check_one_line(capsys, ["output_dir", "exists"])


def test_files_of_others_are_not_written_over(model_folder, run, tmp_path, capsys):
    """Here those of a training run, and then an evaluation's own."""
    results = (run / "results.json").read_bytes()
    assert main(arguments(model_folder, run, model="/no/model", prompts=TINY_SHAPES_PROMPTS)) == 2
    check_one_line(capsys, [str(run), "results.json", "--overwrite true"])
    assert (run / "results.json").read_bytes() == results
    short = dict(num_prompts=1, seeds=1, num_videos=1, rewards=BRIGHTNESS)
    (tmp_path / "table.md").write_text("mine")
    assert main(arguments(model_folder, tmp_path, overwrite="true", **short)) == 0
    assert main(arguments(model_folder, tmp_path, **short)) == 0
    assert "mine" not in (tmp_path / "table.md").read_text()


def test_a_full_disk_is_one_line(model_folder, tmp_path, capsys):
    with full_disk(1000):
        assert main(arguments(model_folder, tmp_path, num_videos=0)) == 2
    error = capsys.readouterr().err
    assert f"error: cannot write {tmp_path / 'results.json'}: " in error and "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == [".run"]


def test_folder_without_prompts(tmp_path, capsys):
    folder = save_tiny_pipeline(tmp_path / "model")
    (folder / "prompts" / "test.txt").unlink()
    assert main(arguments(folder, tmp_path / "out")) == 2
    check_one_line(capsys, ["has no test.txt", "cannot be loaded as a dataset"])
