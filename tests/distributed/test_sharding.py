"""FSDP2 over two processes on a CPU, against the same run in one process with the whole weights."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from tests.processes import Torchrun
from tests.training.helpers import tiny_arguments
from tests.training.sharded_worker import main


# Three held-out videos and batches of one: the processes do not have equally many.
VALUES = {
    "num_eval_prompts": 3,
    "eval_seeds": 1,
    "train_batch_size": 2,
    "batches_per_epoch": 2,
    "max_train_steps": 2,
    "checkpointing_steps": 1,
    "eval_steps": 2,
    "ema_decay": 0.5,
    "reference_reset_epochs": 1,
    "kl_weight": 0.5,
    "learning_rate": 1e-3,
    # A step of 1e-3 for a gradient of nothing but rounding would differ by chance.
    "adam_epsilon": 1e-6,
    "gradient_checkpointing": True,
}


def run(model, folder, **values):
    """Two processes with the weights in shards; returns what each says of them."""
    arguments = tiny_arguments(model, folder, **VALUES | values)
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    code, output = Torchrun("tests/training/sharded_worker.py", *arguments, **fsdp).finish(timeout=300)
    assert code == 0, output
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def runs(model_folder, tmp_path_factory):
    """Folders of the run in shards and of one in this process, with as many samples, and what each says."""
    folders = {sharded: tmp_path_factory.mktemp("run") for sharded in (True, False)}
    reports = {True: run(model_folder, folders[True])}
    values = VALUES | {"batches_per_epoch": 2 * VALUES["batches_per_epoch"]}
    main(tiny_arguments(model_folder, folders[False], **values))
    reports[False] = [json.loads((folders[False] / "rank0.json").read_text())]
    return folders, reports


def test_all_weights_are_in_shards(runs):
    _, reports = runs
    for report in reports[True]:
        assert report["world_size"] == 2 and report["sharded"] == 1
        assert report["adapters"] == ["default", "ema", "old", "reference"]
        # Rows that do not divide evenly are padded.
        assert report["local"] < 0.6
    assert all(report["sharded"] == 0 for report in reports[False])


@pytest.mark.parametrize(
    "file",
    [
        "pytorch_lora_weights.safetensors",
        "checkpoints/checkpoint-1/pytorch_lora_weights.safetensors",
        "checkpoints/checkpoint-2/pytorch_lora_weights_old.safetensors",
        "checkpoints/checkpoint-2/pytorch_lora_weights_reference.safetensors",
    ],
)
def test_it_learns_the_same(runs, file):
    folders, _ = runs
    sharded, whole = (load_file(folders[s] / file) for s in (True, False))
    assert sharded.keys() == whole.keys()
    for name, weight in whole.items():
        # Adam makes a step, of 1e-3 here, of any gradient, and of one that is small more of its rounding.
        difference = (sharded[name] - weight).abs()
        assert difference.max() < 5e-5 and difference.mean() < 2e-6, name
    assert max(weight.abs().max() for name, weight in whole.items() if "lora_B" in name) > 1e-4


def test_it_says_the_same(runs):
    folders, _ = runs
    for name in ("metrics.jsonl", "eval.jsonl"):
        sharded, whole = (
            [json.loads(line) for line in (folders[s] / name).read_text().splitlines()] for s in (True, False)
        )
        assert len(sharded) == len(whole) > 1
        for a, b in zip(sharded, whole):
            for key in ("reward", "loss", "kl", "grad_norm") if name == "metrics.jsonl" else ():
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-6)
            if name == "eval.jsonl":
                assert len(a["scores"]["reward"]) == 3
                assert a["scores"]["reward"] == pytest.approx(b["scores"]["reward"], abs=1e-5)


def test_the_adapter_loads_into_a_pipeline(runs, model_folder):
    folders, _ = runs
    pipe = DiffusionPipeline.from_pretrained(model_folder)
    pipe.load_lora_weights(folders[True])
    weights = dict(pipe.transformer.named_parameters())
    saved = load_file(folders[True] / "pytorch_lora_weights.safetensors")
    for name, value in saved.items():
        path = name.removeprefix("transformer.").replace(".weight", ".default_0.weight")
        assert torch.equal(weights[path], value)


@pytest.mark.slow
def test_resuming_is_exact(runs, model_folder, tmp_path):
    folders, _ = runs
    run(model_folder, tmp_path, max_train_steps=1)
    run(model_folder, tmp_path, resume_from_checkpoint="latest")
    resumed, whole = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (tmp_path, folders[True]))
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())
