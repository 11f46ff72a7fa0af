"""Whole runs with every part of the algorithm, in this process, on the random tiny pipeline."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.helpers import tiny_arguments


sys.path.append(str(Path(__file__).parents[2] / "examples"))
from train_nft import main  # noqa: E402


pytestmark = pytest.mark.usefixtures("no_charts")


BRIGHTNESS, CONTRAST = "tests.training.rewards:brightness", "tests.training.rewards:contrast"
# One group of four videos in two batches; what is evaluated is as short as can be.
SIZES = {"train_batch_size": 2, "batches_per_epoch": 2, "num_eval_prompts": 1, "eval_num_frames": 9}
TWO_REWARDS = {"rewards": f"{BRIGHTNESS}=1,{CONTRAST}=0.5", "eval_rewards": "", "num_frames": 9}


def run(model_folder, folder, **values):
    assert main(tiny_arguments(model_folder, folder, **SIZES | values)) == 0
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def adapter(folder, name="pytorch_lora_weights.safetensors"):
    return load_file(folder / name)


@pytest.fixture(scope="module")
def plain(model_folder, tmp_path_factory):
    """Adapters of runs without options, with one reward and with two."""
    folders = [tmp_path_factory.mktemp("plain") for _ in range(2)]
    run(model_folder, folders[0])
    run(model_folder, folders[1], **TWO_REWARDS)
    return [adapter(folder) for folder in folders]


@pytest.mark.parametrize(
    "values",
    [
        {"context": "noisy"},
        {"context_policy": "own"},
        {"loss_weighting": "adaptive"},
        {"window_size": 3, "sample_frames": 9},
        {"window_size": 3, "sample_frames": 9, "window_selection": "choices", "window_choices": "3,6"},
        {"window_size": 3, "sample_frames": 9, "shared_past": True},
        {"window_size": 3, "sample_frames": 9, "shared_past": True, "context_policy": "own"},
        {**TWO_REWARDS, "reward_normalization": "group"},
        {**TWO_REWARDS, "advantage_reward": "primary", "primary_reward": CONTRAST},
        {**TWO_REWARDS, "selective_kl": True},
        {**TWO_REWARDS, "selective_kl": True, "risk_rule": "released", "kl_average": "batch"},
    ],
    ids=lambda values: " ".join(f"{k}={str(v).split(':')[-1]}" for k, v in values.items() if k not in TWO_REWARDS),
)
def test_every_option_trains_and_changes_the_result(model_folder, tmp_path, plain, values):
    metrics = run(model_folder, tmp_path, **values)
    assert all(record["grad_norm"] > 0 for record in metrics)
    weights, others = adapter(tmp_path), plain["rewards" in values]
    assert weights.keys() == others.keys()
    assert max((weights[name] - others[name]).abs().max() for name in weights) > 1e-6


def test_selective_kl_holds_some_samples(model_folder, tmp_path):
    values = {**TWO_REWARDS, "selective_kl": True, "max_train_steps": 4, "eval_steps": 4}
    metrics = run(model_folder, tmp_path, **values, kl_weight=10.0)
    assert all(0 < record["kl_samples"] < 1 for record in metrics)
    assert metrics[-1]["kl"] > 0 and 0.02 <= metrics[-1]["risk_ratio"] <= 0.2


def test_the_kl_is_a_mean_over_the_step_or_over_batches(model_folder, tmp_path):
    """One of eight samples is held: over the step its KL counts in full, over two batches, one without, half."""
    values = {**TWO_REWARDS, "selective_kl": True, "risk_ratio": 0.02, "risk_ratio_max": 0.02}
    values |= {"train_batch_size": 4, "height": 32}
    over_step = run(model_folder, tmp_path / "selected", **values)
    over_batches = run(model_folder, tmp_path / "batch", **values, kl_average="batch")
    # At first the KL is zero, and so is its gradient: in the second step the policies are still the same.
    assert [record["kl_samples"] for record in over_step] == [record["kl_samples"] for record in over_batches]
    assert over_step[1]["kl_samples"] == 1 / 8 and over_step[1]["kl"] > 1e-9
    assert over_batches[1]["kl"] == pytest.approx(over_step[1]["kl"] / 2, rel=1e-4)


def test_the_reference_moves(model_folder, tmp_path):
    """Older than one epoch it becomes the current policy: right after, the KL is that of one step."""
    values = {"max_train_steps": 3, "checkpointing_steps": 4, "eval_steps": 4, "learning_rate": 1e-2, "num_frames": 9}
    fixed = run(model_folder, tmp_path / "fixed", **values)
    moving = run(model_folder, tmp_path / "moving", **values | {"max_train_steps": 4}, reference_reset_epochs=1)
    assert [record["reference_age"] for record in moving] == [1, 0, 1, 0]
    assert moving[1]["kl"] == pytest.approx(fixed[1]["kl"], rel=1e-4)
    assert moving[2]["kl"] == pytest.approx(0, abs=1e-9) and fixed[2]["kl"] > 1e-6
    assert moving[3]["kl"] > 1e-9
    reset = run(model_folder, tmp_path / "kl", **values, reference_reset_kl=fixed[1]["kl"] / 2)
    assert reset[1]["reference_age"] == 0 and reset[2]["kl"] == pytest.approx(0, abs=1e-9)


def test_the_moving_threshold_is_that_of_the_run_that_is_resumed(model_folder, tmp_path):
    values = {
        "reference_reset_kl": 1e-7,
        "reference_reset_kl_step": 1.0,
        "max_train_steps": 3,
        "checkpointing_steps": 2,
        "eval_steps": 3,
        "num_frames": 9,
    }
    records = run(model_folder, tmp_path, **values, learning_rate=1e-2)
    assert [record["reference_reset_kl"] for record in records] == [1e-7, 1 + 1e-7, 1 + 1e-7]
    resumed = run(model_folder, tmp_path, **values, learning_rate=1e-2, resume_from_checkpoint="checkpoint-2")
    assert resumed[-1]["reference_reset_kl"] == records[-1]["reference_reset_kl"]


def test_the_average_is_judged_and_saved(model_folder, tmp_path):
    values = {"max_train_steps": 3, "learning_rate": 1e-2, "checkpointing_steps": 1, "num_frames": 9}
    run(model_folder, tmp_path, **values, ema_decay=0.75)
    steps = [adapter(tmp_path / "checkpoints" / f"checkpoint-{step}") for step in (1, 2, 3)]
    saved = adapter(tmp_path)
    assert saved.keys() == steps[0].keys()
    for name, value in saved.items():
        if "lora_B" in name:  # starts at zero
            # Weights 1/10, 2/11 and 1/4 of what was there before.
            expected = 0.9 * steps[0][name]
            for decay, step in zip((2 / 11, 3 / 12), steps[1:]):
                expected = decay * expected + (1 - decay) * step[name]
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "values,words",
    [
        ({"selective_kl": True}, "selective_kl compares the primary reward with the others"),
        ({"primary_reward": "sharpness"}, "primary_reward 'sharpness' is none of"),
        ({"window_size": 4}, "window_size=4 is no whole number of blocks of 3"),
        ({"context": "noisy", "window_size": 3}, "context=noisy trains a whole video"),
        ({"context": "dirty"}, "clean, clean_grad, noisy"),
    ],
)
def test_errors(model_folder, tmp_path, capsys, values, words):
    assert main(tiny_arguments(model_folder, tmp_path, **values)) == 2
    assert words in capsys.readouterr().err
