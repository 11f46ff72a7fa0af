"""Whole runs of examples/train_nft.py, in this process, on the random tiny pipeline."""

import contextlib
import io
import json
import multiprocessing
import stat
import sys
import threading
from pathlib import Path

import imageio.v3
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from astrolabe_diffusers.evaluation.held_out import HeldOut
from astrolabe_diffusers.rollout import reward_thread
from astrolabe_diffusers.rollout.prompts import PromptSource, train_and_eval_prompts
from astrolabe_diffusers.rollout.samples import eval_samples
from astrolabe_diffusers.rollout.sampling import Rollout
from astrolabe_diffusers.training.run_folder import TRAINING_FILES
from tests.training.helpers import ALL_REPORTS, creation_mask, full_disk, reward_worker, threads_left, tiny_arguments


sys.path.append(str(Path(__file__).parents[2] / "examples"))
from train_nft import main  # noqa: E402


pytestmark = pytest.mark.usefixtures("no_charts")  # but for the run of `finished`

BRIGHTNESS = "tests.training.rewards:brightness"
FOUR_STEPS = dict(max_train_steps=4, checkpointing_steps=2, eval_steps=2, eval_seeds=2, eval_num_frames=21, seed=3)
# A step is the sum over two batches.
FOUR_STEPS |= dict(batches_per_epoch=2, lr_scheduler="cosine", lr_warmup_steps=1, learning_rate=3e-2)
WHOLE = ALL_REPORTS | FOUR_STEPS


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(model_folder, tmp_path_factory):
    """Folder and standard output of an uninterrupted run of four steps."""
    folder = tmp_path_factory.mktemp("run") / "out"
    output = io.StringIO()
    with contextlib.redirect_stdout(output), creation_mask(0o027):
        code = main(tiny_arguments(model_folder, folder, **WHOLE))
    assert code == 0
    return folder, output.getvalue()


def test_run_writes_its_files(finished):
    folder, _ = finished
    for name in (
        "pytorch_lora_weights.safetensors",
        "checkpoints/checkpoint-2/pytorch_lora_weights.safetensors",
        "checkpoints/checkpoint-4/pytorch_lora_weights_old.safetensors",
        "eval_videos/step-0/000.mp4",
        "eval_videos/step-4/001.mp4",
        "before_after.mp4",
        "before_after.png",
        "before_after.gif",
        "README.md",
        "rewards.png",
        "results.json",
    ):
        assert (folder / name).stat().st_size > 0, name
    assert list(folder.glob("logs/nft/events.out.tfevents.*"))
    assert yaml.safe_load((folder / "config.yaml").read_text())["rank"] == 4


def test_all_that_a_run_writes_is_known_and_has_the_mode_of_the_umask(finished):
    folder, _ = finished
    known = {path for pattern in TRAINING_FILES for path in folder.glob(pattern)}
    files = [path for path in folder.rglob("*") if path.is_file()]
    others = {path for path in files if not known & {path, *path.parents}}
    assert {path.relative_to(folder).parts[0] for path in others} == {".run", "logs"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640} and len(files) > 20


def test_a_second_start_says_what_to_do(finished, model_folder, capsys):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(tiny_arguments(model_folder, folder, **FOUR_STEPS)) == 2
    error = capsys.readouterr().err
    assert error == (
        f"error: {folder} holds a finished run: --resume_from_checkpoint latest goes on with it, another --output_dir "
        "begins anew there, and --overwrite_output_dir true begins anew here.\n"
    )
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_overwriting_begins_anew(model_folder, tmp_path, capsys):
    short = dict(max_train_steps=1, checkpointing_steps=1)
    assert main(tiny_arguments(model_folder, tmp_path, num_eval_videos=1, checkpointing_steps=1)) == 0
    assert main(tiny_arguments(model_folder, tmp_path, **short, overwrite_output_dir="true")) == 0
    assert "set aside, as .set_aside: checkpoint-1, checkpoint-2" in capsys.readouterr().out
    assert [record["step"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == [1]
    assert not list(tmp_path.glob("before_after.*")) and not list(tmp_path.glob("eval_videos/step-2/*"))
    checkpoints = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert checkpoints == {"checkpoint-1", "checkpoint-1.set_aside", "checkpoint-2.set_aside"}
    # And it is a run as any other: one that goes on with it makes it longer.
    arguments = tiny_arguments(model_folder, tmp_path, **short | dict(max_train_steps=2))
    assert main([*arguments, "--resume_from_checkpoint", "latest"]) == 0
    assert [record["step"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]


def test_run_reports_everything(finished):
    folder, output = finished
    metrics = read_jsonl(folder / "metrics.jsonl")
    assert [record["step"] for record in metrics] == [1, 2, 3, 4]
    names = {"reward", BRIGHTNESS, f"{BRIGHTNESS}/red", "group_std", "zero_spread_groups", "loss", "policy_loss", "kl"}
    names |= {"grad_norm", "deviation", "x0_norm", "learning_rate", "seconds_sampling", "seconds_scoring"}
    names |= {"seconds_training", "samples_per_second", "peak_memory_gb"}
    assert names <= metrics[0].keys()
    # All policies are equal before the first step.
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-10) and metrics[0]["deviation"] == pytest.approx(0, abs=1e-5)
    assert metrics[-1]["kl"] > 0 and metrics[-1]["deviation"] > 0
    evaluations = read_jsonl(folder / "eval.jsonl")
    assert [record["step"] for record in evaluations] == [0, 2, 4]
    assert len(evaluations[0]["scores"]["reward"]) == 4
    results = json.loads((folder / "results.json").read_text())
    change = results["scores"]["reward"]
    assert change["after"] == pytest.approx(evaluations[-1]["mean"]["reward"])
    assert change["change"] == pytest.approx(change["after"] - change["before"])
    for text in ("step 4/4", "only watched", "tests.training.rewards:contrast", "peak memory", str(folder)):
        assert text in output


def test_reloaded_adapter_reproduces_the_evaluation(finished, model_folder):
    folder, _ = finished
    pipe = DiffusionPipeline.from_pretrained(model_folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(folder)
    samples = eval_samples(train_and_eval_prompts(PromptSource(str(model_folder / "prompts")), 2)[1], 2)
    worker = reward_worker(pipe)
    size = {"height": 16, "width": 32, "num_frames": 21}
    with torch.no_grad():
        evaluation, _ = HeldOut(Rollout(pipe, worker), samples, size, 4).evaluate()
    worker.close()
    first, *_, last = read_jsonl(folder / "eval.jsonl")
    assert evaluation.scores["reward"] == pytest.approx(last["scores"]["reward"], abs=1e-6)
    differences = [abs(a - b) for a, b in zip(first["scores"]["reward"], last["scores"]["reward"])]
    assert max(differences) > 1e-4


def test_resumed_run_has_the_numbers_of_the_uninterrupted_one(finished, model_folder, tmp_path):
    folder, _ = finished
    arguments = tiny_arguments(model_folder, tmp_path, **FOUR_STEPS)
    assert main(arguments) == 0
    # As if killed while writing the second checkpoint: the logs have come further than the checkpoint before.
    last = tmp_path / "checkpoints" / "checkpoint-4"
    last.rename(last.with_name("checkpoint-4.partial"))
    assert main([*arguments, "--resume_from_checkpoint", "latest"]) == 0

    expected = load_file(folder / "pytorch_lora_weights.safetensors")
    actual = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    names = ("reward", "loss", "kl", "grad_norm", "deviation", "x0_norm", "learning_rate", "group_std")
    for a, b in zip(read_jsonl(folder / "metrics.jsonl"), read_jsonl(tmp_path / "metrics.jsonl"), strict=True):
        assert {name: a[name] for name in names} == {name: b[name] for name in names}
    assert read_jsonl(folder / "eval.jsonl") == read_jsonl(tmp_path / "eval.jsonl")
    file = "checkpoints/checkpoint-4/trainer_state.json"
    states = [json.loads((path / file).read_text()) for path in (folder, tmp_path)]
    for state in states:
        state.pop("train_seconds")
    assert states[0] == states[1]


def test_resuming_a_finished_run_only_reports(finished, model_folder, capsys):
    folder, _ = finished
    before = load_file(folder / "pytorch_lora_weights.safetensors")
    arguments = tiny_arguments(model_folder, folder, **WHOLE, resume_from_checkpoint="latest")
    assert main(arguments) == 0
    after = load_file(folder / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [record["step"] for record in read_jsonl(folder / "eval.jsonl")] == [0, 2, 4]
    output = capsys.readouterr().out
    assert "resuming from" in output and "all 4 steps are done" in output


def test_several_optimizer_steps_an_epoch(model_folder, tmp_path):
    values = dict(batches_per_epoch=2, gradient_accumulation_steps=1, max_train_steps=4, eval_steps=4)
    arguments = tiny_arguments(model_folder, tmp_path, **values)
    assert main(arguments) == 0
    metrics = read_jsonl(tmp_path / "metrics.jsonl")
    assert [(record["epoch"], record["step"]) for record in metrics] == [(1, 2), (2, 4)]
    # Inside an epoch the current policy leaves the old one, which made the samples.
    assert metrics[0]["deviation"] > 1e-4


def test_held_out_videos_of_another_length(model_folder, tmp_path):
    """A reward that names the number of frames it was given: 9 in training, 21 held out."""
    arguments = tiny_arguments(
        model_folder,
        tmp_path,
        num_frames=9,
        eval_num_frames=21,
        rewards="tests.training.rewards:frame_count",
        max_train_steps=1,
        eval_steps=1,
        num_eval_videos=1,
    )
    assert main(arguments) == 0
    assert [record["reward"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == [9]
    evaluations = read_jsonl(tmp_path / "eval.jsonl")
    assert len(evaluations) == 2 and all(set(e["scores"]["reward"]) == {21} for e in evaluations)
    assert len(imageio.v3.imread(tmp_path / "eval_videos/step-1/000.mp4")) == 21


def test_bfloat16_run(model_folder, tmp_path, own_precision):
    arguments = tiny_arguments(model_folder, tmp_path, mixed_precision="bf16", old_policy_decay_rate=0.5)
    assert main(arguments) == 0
    metrics = read_jsonl(tmp_path / "metrics.jsonl")
    # Old and current policy run at the same precision: what tells them apart is training alone.
    assert metrics[0]["deviation"] == pytest.approx(0, abs=1e-6) and metrics[1]["deviation"] > 1e-2
    weights = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_nan_rewards_are_skipped_on_request(model_folder, tmp_path):
    values = dict(rewards="tests.training.rewards:sometimes_nan", nan_reward="skip", max_train_steps=1)
    assert main(tiny_arguments(model_folder, tmp_path, **values, batches_per_epoch=2)) == 0
    record = read_jsonl(tmp_path / "metrics.jsonl")[0]
    assert 0 < record["skipped_samples"] < 8 and record["loss"] == record["loss"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_frames": 5}, ["num_frames", "at least 9, not 5"]),
        ({"eval_num_frames": 5}, ["num_frames", "at least 9, not 5"]),
        ({"height": 30}, ["height", "multiple of 16"]),
        ({"rewards": "beauty"}, ["unknown reward 'beauty'", "tiny_shapes_prompt_match"]),
        ({"eval_rewards": "beauty"}, ["eval_rewards", "unknown reward 'beauty'"]),
        ({"rewards": "tests.training.rewards:always_nan"}, ["always_nan", "nan"]),
        ({"rewards": "tests.training.rewards:always_nan", "nan_reward": "skip"}, ["no video of this epoch"]),
        ({"rewards": "tests.training.rewards:broken"}, ["ZeroDivisionError", "a reward that cannot work"]),
        ({"prompts": "nowhere"}, ["nowhere is no prompt file", "cannot be loaded as a dataset"]),
        ({"model": "/no/model"}, ["cannot load /no/model"]),
        ({"model": "/no/model", "prompts": "none"}, ["no folder /no/model/prompts"]),
        ({"samples_per_prompt": 5, "batches_per_epoch": 2}, ["8 samples", "2, 4 or 8"]),
        ({"samples_per_prompt": 1}, ["samples_per_prompt must be at least 2"]),
        ({"rank": 10**9}, ["out of memory"]),
        ({"resume_from_checkpoint": "checkpoint-7"}, ["no checkpoint checkpoint-7"]),
        ({"lora_target_modules": "nothing_like_it"}, ["cannot add the LoRA", "nothing_like_it"]),
        ({"init_lora": "/no/lora"}, ["init_lora /no/lora: "]),
        ({"lr_scheduler": "wave"}, ["lr_scheduler", "wave"]),
        ({"learning_rate": 30, "collapse_factor": 1.001}, ["step 2", "collapsed", "learning_rate"]),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(model_folder, tmp_path, capsys, values, words):
    # Prompts of their own: a wrong model is to be found by loading it.
    values = {"prompts": model_folder / "prompts"} | values
    threads = set(threading.enumerate())
    assert main(tiny_arguments(model_folder, tmp_path / "out", **values)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert all(word in lines[0] for word in words), lines[0]
    assert threads_left(threads) <= {"tqdm_monitor"}
    # And the same command, put right, may start at once: nobody holds the folder.
    assert main(tiny_arguments(model_folder, tmp_path / "out", model="/no/model")) == 2
    assert "another run" not in capsys.readouterr().err


def test_processes_of_rewards_end_with_a_run_that_fails(model_folder, tmp_path, capsys):
    values = {"reward_placement": f"{BRIGHTNESS}=process", "lora_target_modules": "nothing_like_it"}
    assert main(tiny_arguments(model_folder, tmp_path, **values)) == 2
    assert "cannot add the LoRA" in capsys.readouterr().err
    assert [process.name for process in multiprocessing.active_children() if process.name == "rewards"] == []


def test_a_full_disk_is_one_line(model_folder, tmp_path, capsys):
    """Here it is TensorBoard that cannot go on, in a thread of its own; there is room for a LoRA."""
    with full_disk(20_000):
        assert main(tiny_arguments(model_folder, tmp_path, **ALL_REPORTS, rank=1)) == 2
    error = capsys.readouterr().err
    assert f"error: cannot write {tmp_path / 'logs'}: " in error.splitlines()[-1]
    assert "Traceback" not in error and "not closed" not in error
    assert not (tmp_path / "results.json").exists() and not list(tmp_path.glob("**/*.partial"))


def test_a_reward_that_hangs_is_one_line(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reward_thread, "PATIENCE", 0.1)
    values = {"rewards": "tests.training.rewards:hangs", "reward_timeout": 0.5}
    assert main(tiny_arguments(model_folder, tmp_path, **values)) == 2
    assert "error: a reward has not answered for 0.5 s" in capsys.readouterr().err


def test_a_run_that_learns_nothing_says_so(model_folder, tmp_path, capsys):
    values = {"rewards": "tests.training.rewards:frame_count", "max_train_steps": 1, "lr_warmup_steps": 5}
    assert main(tiny_arguments(model_folder, tmp_path, **values)) == 0
    output = capsys.readouterr().out
    assert "step 1: nothing was learnt, for the rewards of every group are equal" in output
    assert "lr_warmup_steps=5 is longer than the run" in output


def test_empty_prompt_file(model_folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n")
    assert main(tiny_arguments(model_folder, tmp_path / "out", prompts=tmp_path / "prompts.txt")) == 2
    assert "prompts.txt is empty" in capsys.readouterr().err


def test_checkpoint_of_another_rank(finished, model_folder, capsys):
    folder, _ = finished
    values = FOUR_STEPS | {"resume_from_checkpoint": "latest", "rank": 8}
    assert main(tiny_arguments(model_folder, folder, **values)) == 2
    assert "of another run: rank is 4 there and 8 here" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("astrolabe_diffusers.training.nft.trainer.follow_current", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(tiny_arguments(model_folder, tmp_path))


def test_reward_goes_where_its_weight_points(model_folder, tmp_path):
    """The same run for a bright and for a dark video: on held-out prompts the reward rises, or falls."""
    change = {}
    for weight in (1, -1):
        folder = tmp_path / str(weight)
        arguments = tiny_arguments(
            model_folder,
            folder,
            rewards=f"{BRIGHTNESS}={weight}",
            num_frames=9,
            train_batch_size=32,
            batches_per_epoch=1,
            samples_per_prompt=8,
            max_train_steps=10,
            eval_steps=10,
            num_eval_prompts=4,
            eval_seeds=4,
            checkpointing_steps=10,
            advantage_std="group",
        )
        assert main(arguments) == 0
        scores = json.loads((folder / "results.json").read_text())["scores"]
        change[weight] = scores[BRIGHTNESS]["change"]
        assert scores["reward"]["change"] > 2 * scores["reward"]["half_width_95"]
    assert change[1] > 0 > change[-1]
