"""Runs that train for the switch: resumed, on two processes, with stored embeddings and a batch size that is found."""

import json

import pytest

from astrolabe_diffusers.cli.train import parse_args
from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.training import NFTTrainer, batch_size
from astrolabe_diffusers.training.algorithms import get_algorithm
from tests.processes import Torchrun
from tests.training.helpers import numbers_of_run, tiny_arguments
from tests.training.memory import limit_batches
from tests.training.test_prompt_embeds import loads  # noqa: F401


pytestmark = pytest.mark.usefixtures("no_charts", "own_precision")

SWITCHES = {
    "transitions": "roll,recache,rope_cut,cut",
    "transition_blocks": 2,
    "switch_distances": "0,1",
    "window_size": 6,
    "sample_frames": 12,
    "eval_num_frames": 33,
    "max_train_steps": 3,
    "eval_steps": 3,
    "lora_dropout": 0.1,
}
SHARED = {**SWITCHES, "transitions": "roll,recache,rope_cut", "shared_past": "true"}


def train(model_folder, folder, algorithm="nft", **values):
    arguments = tiny_arguments(model_folder, folder, algorithm=algorithm, **SWITCHES | values)
    trainer = get_algorithm(algorithm)(config=parse_args(arguments))
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def whole(model_folder, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("astrolabe_diffusers.reporting.report.draw_curves", lambda *_, **__: None)
        folder = tmp_path_factory.mktemp("whole")
        train(model_folder, folder, checkpointing_steps=1)
    return folder


def test_held_out_videos_have_all_transitions(whole):
    """Two prompts and one seed of each: paired, in four ways."""
    evaluations = [json.loads(line) for line in (whole / "eval.jsonl").read_text().splitlines()]
    values = evaluations[-1]["scores"]["reward"]
    assert len(values) == 8 and len(set(values)) == 8
    metrics = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 3 and len({record["reward"] for record in metrics}) == 3


def test_a_run_that_goes_on_is_the_run_that_did_not_stop(whole, model_folder, tmp_path):
    train(model_folder, tmp_path, checkpointing_steps=1, max_train_steps=1)
    train(model_folder, tmp_path, checkpointing_steps=1, resume_from_checkpoint="latest")
    resumed, expected = numbers_of_run(tmp_path), numbers_of_run(whole)
    assert resumed["state"] == expected["state"] and resumed["metrics"] == expected["metrics"]
    assert resumed["pytorch_lora_weights.safetensors"] == expected["pytorch_lora_weights.safetensors"]


@pytest.mark.parametrize("algorithm", ["awm", "cm_grpo"])
def test_other_algorithms(algorithm, model_folder, tmp_path):
    values = {"context": "clean", **({} if algorithm == "awm" else {"train_steps": "0,1"})}
    trainer = train(model_folder, tmp_path, algorithm, **SHARED | values)
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert trainer.step == 3 and all(abs(record["loss"]) > 0 for record in metrics)


def test_stored_embeddings_are_of_both_texts(model_folder, tmp_path, loads):  # noqa: F811
    embeds = tmp_path / "embeds"
    for name in ("without", "first", "second"):
        values = {} if name == "without" else {"prompt_embeds_dir": embeds}
        train(model_folder, tmp_path / name, **SHARED | values)
    runs = [numbers_of_run(tmp_path / name) for name in ("without", "first", "second")]
    assert runs[0] == runs[1] == runs[2]
    assert len(loads) == 2


def test_a_batch_size_that_is_found(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_size, "says_when_memory_is_full", lambda device: True)
    auto = {"train_batch_size": "auto", "batches_per_epoch": 4}
    train(model_folder, tmp_path / "two", **SHARED | {"train_batch_size": 2, "batches_per_epoch": 2})
    trainer = NFTTrainer(config=parse_args(tiny_arguments(model_folder, tmp_path / "auto", **SHARED | auto)))
    limit_batches(trainer.transformer, 2)
    trainer.train()
    assert trainer.config.train_batch_size == 2
    assert numbers_of_run(tmp_path / "auto") == numbers_of_run(tmp_path / "two")


def test_two_processes_are_one(model_folder, tmp_path):
    values = SHARED | {"lora_dropout": 0.0, "max_train_steps": 2, "train_batch_size": 2}
    train(model_folder, tmp_path / "one", **values | {"batches_per_epoch": 4})
    arguments = tiny_arguments(model_folder, tmp_path / "two", **values | {"batches_per_epoch": 2})
    code, output = Torchrun("examples/train_nft.py", *arguments).finish()
    assert code == 0, output
    one, two = (numbers_of_run(tmp_path / name) for name in ("one", "two"))
    for name in ("reward", "loss", "grad_norm"):
        for a, b in zip(one["metrics"], two["metrics"], strict=True):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-6)
    for a, b in zip(one["evaluations"], two["evaluations"], strict=True):
        assert a["scores"]["reward"] == pytest.approx(b["scores"]["reward"], abs=1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"context": "clean_grad"}, "transitions need context=clean"),
        ({"switch_prompts": "scenes"}, "has one scene: write `a | b`, or set switch_prompts=pairs"),
        ({"shared_past": "true"}, "after a cut there is no past to share"),
        ({"eval_num_frames": 9}, "held-out videos of 1 blocks end before the second scene"),
    ],
)
def test_what_cannot_be_trained(values, message, model_folder, tmp_path):
    with pytest.raises(UserError, match=message):
        train(model_folder, tmp_path, **values)


def test_a_model_says_which_transitions_it_has(tmp_path):
    from tests.tiny_pipeline import save_tiny_pipeline

    ema = {"local_attn_size": 9, "sink_size": 3, "rope_mode": "relative", "sink_ema": 0.9}
    folder = save_tiny_pipeline(tmp_path / "model", **ema)
    with pytest.raises(UserError, match="`transition` must be one of .'roll', 'recache', 'cut'. but is 'rope_cut'"):
        train(folder, tmp_path / "run")
