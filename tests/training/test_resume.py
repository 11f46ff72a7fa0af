"""Runs that a signal stops, resumed: they have the numbers of the run that nothing stopped."""

import json
import pickle
import shutil
import signal

import pytest
import torch

from astrolabe_diffusers.cli.train import parse_args
from astrolabe_diffusers.files.writing import seal
from astrolabe_diffusers.training import NFTTrainer, exit_code
from tests.training import rewards
from tests.training.helpers import numbers_of_run, tiny_arguments
from tests.training.test_checkpoints import Evil


pytestmark = pytest.mark.usefixtures("no_charts")


# Two optimizer steps an epoch, three epochs; 2 batches of an epoch and 1 of an evaluation are scored by a call each.
SETTINGS = dict(
    rewards="tests.training.rewards:sends_a_signal",
    gradient_accumulation_steps=1,
    max_train_steps=6,
    checkpointing_steps=4,
    eval_steps=4,
    lr_scheduler="cosine",
    num_frames=9,
    lora_dropout=0.1,
    batches_per_epoch=2,
)


def run(model_folder, folder, **values):
    """Exit code of a run, and its trainer."""
    trainers = []

    def train():
        trainers.append(NFTTrainer(config=parse_args(tiny_arguments(model_folder, folder, **SETTINGS | values))))
        return trainers[0].train()

    return exit_code(train), trainers[0]


@pytest.fixture(autouse=True)
def trouble(tmp_path, monkeypatch):
    monkeypatch.setattr(rewards, "_calls", 0)
    monkeypatch.setenv("TROUBLE_MARK", str(tmp_path / "mark"))
    monkeypatch.setenv("TROUBLE_SIGNAL", "SIGTERM")
    return monkeypatch


@pytest.fixture(scope="module")
def whole_run(model_folder, tmp_path_factory):
    """The folder of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards, "_calls", 0)
        patch.setenv("TROUBLE_CALL", "0")
        patch.setenv("TROUBLE_MARK", str(folder / "mark"))
        assert run(model_folder, folder)[0] == 0
    return folder


@pytest.fixture(scope="module")
def uninterrupted(whole_run):
    return numbers_of_run(whole_run)


@pytest.mark.parametrize(
    ("call", "name", "step"),
    # Where the signal comes: in the first evaluation, in the second epoch, in the evaluation after it.
    [(1, "SIGTERM", 0), (4, "SIGINT", 2), (6, "SIGTERM", 4)],
)
def test_a_signal_saves_the_last_complete_epoch(
    model_folder, tmp_path, uninterrupted, trouble, capfd, call, name, step
):
    trouble.setenv("TROUBLE_CALL", str(call))
    trouble.setenv("TROUBLE_SIGNAL", name)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    code, _ = run(model_folder, tmp_path / "out")
    assert code == 128 + signal.Signals[name]  # 143 and 130, as in a shell
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    output = capfd.readouterr()
    assert f"{name}: --resume_from_checkpoint latest goes on from" in output.out
    assert f"{name}: stopping" in output.err
    checkpoints = sorted((tmp_path / "out" / "checkpoints").iterdir())
    assert checkpoints[-1].name == f"checkpoint-{step}"

    code, _ = run(model_folder, tmp_path / "out", resume_from_checkpoint="latest")
    assert code == 0
    assert numbers_of_run(tmp_path / "out") == uninterrupted


def test_signal_after_the_first_step_of_an_epoch_waits_for_its_end(model_folder, tmp_path, uninterrupted, trouble):
    """There the policy has moved: the epoch can no longer be given up."""
    trouble.setenv("TROUBLE_CALL", "0")
    trainer = NFTTrainer(config=parse_args(tiny_arguments(model_folder, tmp_path, **SETTINGS)))
    steps = []
    trainer.optimizer.optimizer.register_step_post_hook(
        lambda *_: steps.append(0) or len(steps) == 3 and signal.raise_signal(signal.SIGTERM)
    )
    assert exit_code(trainer.train) == 143
    assert len(steps) == 4 and [path.name for path in trainer.checkpoints.list()] == ["checkpoint-4"]
    assert run(model_folder, tmp_path, resume_from_checkpoint="latest")[0] == 0
    assert numbers_of_run(tmp_path) == uninterrupted


def test_signal_between_the_batches_of_a_step(model_folder, tmp_path, trouble):
    """The gradients so far are given up, and the random numbers of their dropout come again."""
    trouble.setenv("TROUBLE_CALL", "0")
    values = dict(gradient_accumulation_steps=2, max_train_steps=2, checkpointing_steps=2, num_frames=21)
    values["blocks_per_pass"] = 2
    assert run(model_folder, tmp_path / "whole", **values)[0] == 0
    arguments = tiny_arguments(model_folder, tmp_path / "out", **SETTINGS | values)
    trainer = NFTTrainer(config=parse_args(arguments))
    passes = []

    def interrupt(model, inputs):
        passes.extend([0] * torch.is_grad_enabled())
        if len(passes) == 3:  # one pass a batch, two batches an epoch: the first pass of the second epoch
            signal.raise_signal(signal.SIGTERM)

    trainer.transformer.register_forward_pre_hook(interrupt)
    assert exit_code(trainer.train) == 143
    assert len(passes) == 3 and trainer.checkpoints.list()[-1].name == "checkpoint-1"
    assert run(model_folder, tmp_path / "out", resume_from_checkpoint="latest", **values)[0] == 0
    assert numbers_of_run(tmp_path / "out") == numbers_of_run(tmp_path / "whole")


def test_damaged_newest_checkpoint(model_folder, tmp_path, whole_run, uninterrupted, trouble, capsys):
    trouble.setenv("TROUBLE_CALL", "0")
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints" / "checkpoint-6" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert run(model_folder, tmp_path, resume_from_checkpoint="latest")[0] == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "checkpoint-6 is damaged" in line]
    assert len(lines) == 1 and "optimizer.safetensors has 1000 bytes" in lines[0]
    assert numbers_of_run(tmp_path) == uninterrupted


def test_a_finished_run_without_a_checkpoint_is_left_alone(model_folder, tmp_path, trouble, capsys):
    """A new run, as `latest` begins in an empty folder, would write over its LoRA."""
    trouble.setenv("TROUBLE_CALL", "0")
    values = dict(max_train_steps=2, checkpointing_steps=2, eval_steps=2)
    assert run(model_folder, tmp_path, **values)[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file() and path.name != "config.yaml"}
    (tmp_path / "checkpoints" / "checkpoint-2" / "optimizer.safetensors").unlink()
    capsys.readouterr()
    assert run(model_folder, tmp_path, resume_from_checkpoint="latest", **values)[0] == 2
    error = capsys.readouterr().err
    assert "holds a finished run, but no whole checkpoint" in error and error.count("\n") == 1
    assert before == {path: path.read_bytes() for path in before}
    again = dict(resume_from_checkpoint="latest", overwrite_output_dir="true")
    assert run(model_folder, tmp_path, **values | again)[0] == 0


def test_new_settings_take_effect_when_resuming(model_folder, tmp_path, trouble):
    """The advice after a collapse: a lower learning rate. The moments stay."""
    trouble.setenv("TROUBLE_CALL", "4")
    assert run(model_folder, tmp_path, lr_scheduler="constant")[0] == 143
    values = dict(learning_rate=1e-3, adam_weight_decay=0.5, lr_scheduler="constant", max_train_steps=4)
    code, trainer = run(model_folder, tmp_path, resume_from_checkpoint="latest", **values)
    assert code == 0
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["learning_rate"] for record in records] == [1e-2, 1e-3]
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.5
    assert {float(state["step"]) for state in trainer.optimizer.state.values()} == {4.0}


def test_a_signal_while_the_beginning_is_judged_anew(model_folder, tmp_path, whole_run, trouble):
    """There the policy is not the checkpoint's for a while."""
    more = dict(eval_seeds=8, resume_from_checkpoint="latest")  # four batches
    numbers = []
    for call in (0, 1):
        folder = tmp_path / str(call)
        shutil.copytree(whole_run, folder)
        trouble.setattr(rewards, "_calls", 0)
        trouble.setenv("TROUBLE_CALL", str(call))
        before = numbers_of_run(folder)
        if call:
            assert run(model_folder, folder, **more)[0] == 143
            assert numbers_of_run(folder) == before
        assert run(model_folder, folder, **more)[0] == 0
        numbers.append(numbers_of_run(folder))
    assert numbers[0] == numbers[1]
    assert [len(evaluation["scores"]["reward"]) for evaluation in numbers[0]["evaluations"]][-2:] == [16, 16]


@pytest.mark.parametrize("name", ["optimizer.safetensors", "trainer_state.json"])
def test_a_planted_checkpoint_is_one_line_and_runs_nothing(model_folder, tmp_path, trouble, capfd, name):
    trouble.setenv("TROUBLE_CALL", "1")
    assert run(model_folder, tmp_path / "out")[0] == 143
    (folder,) = (tmp_path / "out" / "checkpoints").iterdir()
    (folder / name).write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    (folder / "files.json").unlink()
    seal(folder)
    capfd.readouterr()
    assert run(model_folder, tmp_path / "out", resume_from_checkpoint="latest")[0] == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line.lower()]
    assert line.startswith("error: ") and name in line and not (tmp_path / "ran").exists()
