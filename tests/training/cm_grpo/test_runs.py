"""Runs of CM-GRPO that are resumed, or lie on two processes: they have the numbers of one that is whole."""

import pytest
import torch
from safetensors.torch import load_file

from astrolabe_diffusers.cli.main import main
from tests.processes import Torchrun
from tests.training.helpers import BRIGHTNESS, numbers_of_run, tiny_arguments


pytestmark = pytest.mark.usefixtures("no_charts")


# A window at a random place, two rewards, an average, a schedule.
SETTINGS = dict(
    algorithm="cm_grpo",
    rewards=f"{BRIGHTNESS}=1,tests.training.rewards:contrast=0.5",
    eval_rewards="tests.training.rewards:frame_count",
    window_size=6,
    sample_frames=9,
    ema_decay=0.9,
    lr_scheduler="constant",
    lr_warmup_steps=3,
    kl_weight=0.1,
    checkpointing_steps=1,
)


def train(model_folder, folder, **values):
    assert main(["train", *tiny_arguments(model_folder, folder, **SETTINGS | values)]) == 0
    return numbers_of_run(folder)


@pytest.mark.parametrize("values", [{}, {"shared_past": "true", "samples_per_prompt": 4, "context": "clean"}])
def test_a_resumed_run_is_the_whole_one(values, model_folder, tmp_path):
    whole = train(model_folder, tmp_path / "whole", max_train_steps=4, eval_steps=2, **values)
    train(model_folder, tmp_path / "parts", max_train_steps=2, eval_steps=2, **values)
    resumed = {"resume_from_checkpoint": "latest", "max_train_steps": 4, "eval_steps": 2}
    assert train(model_folder, tmp_path / "parts", **resumed, **values) == whole
    assert whole["metrics"][-1]["step"] == 4 and whole["metrics"][-1]["grad_norm"] > 0


@pytest.mark.parametrize("values", [{}, {"shared_past": "true", "samples_per_prompt": 4}])
def test_two_processes_are_one(values, model_folder, tmp_path):
    """A group lies on both, and so do its statistics. An epsilon above the gradients: where a gradient is next to
    nothing Adam's first step is else as long, in whatever direction rounding gives it."""
    values = dict(max_train_steps=2, adam_epsilon=1e-2, lr_warmup_steps=0, reward_normalization_size=2) | values
    one = train(model_folder, tmp_path / "one", train_batch_size=4, **values)
    arguments = tiny_arguments(model_folder, tmp_path / "two", **SETTINGS | values | {"train_batch_size": 2})
    code, output = Torchrun("examples/train_nft.py", *arguments).finish()
    assert code == 0 and "2 processes on cpu" in output, output
    two = numbers_of_run(tmp_path / "two")
    for name in ("loss", "policy_loss", "kl", "step_noise", "grad_norm", "reward", "group_std"):
        for a, b in zip(one["metrics"], two["metrics"], strict=True):
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-6), name
    assert one["metrics"][0]["grad_norm"] > 1e-3
    weights = [load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("one", "two")]
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-5)
    assert max(weight.abs().max() for name, weight in weights[0].items() if "lora_B" in name) > 1e-4
