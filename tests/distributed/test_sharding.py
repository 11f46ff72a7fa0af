"""FSDP2 over processes on a CPU, against the same run in one process with the whole weights."""

import json
import shutil
from uuid import uuid4

import pytest
import torch
from accelerate.utils import ParallelismConfig
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from astrolabe_diffusers.distributed.sharding import mesh_sizes
from astrolabe_diffusers.errors import UserError
from tests.processes import Torchrun
from tests.tiny_pipeline import SMALL, save_tiny_pipeline
from tests.training.helpers import tiny_arguments
from tests.training.sharded_rollout_worker import make_trainer, rollout_scores
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
    "lora_target_modules": "all-linear",
    "reference_reset_epochs": 1,
    "kl_weight": 0.5,
    "learning_rate": 1e-3,
    # A step of 1e-3 for a gradient of nothing but rounding would differ by chance.
    "adam_epsilon": 1e-5,
    "gradient_checkpointing": True,
    "blocks_per_pass": 7,
}


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def run(model, folder, machines=1, worker="sharded_worker", environment=None, **values):
    """Two processes a machine with the weights in shards; returns what each says of them."""
    arguments = tiny_arguments(model, folder, **VALUES | values)
    options = FSDP | (environment or {})
    if machines > 1:
        options |= {"rendezvous": folder.with_name(f"{folder.name}-{uuid4()}"), "machines": machines}
    launchers = [Torchrun(f"tests/training/{worker}.py", *arguments, **options) for _ in range(machines)]
    for launcher in launchers:
        code, output = launcher.finish(timeout=300)
        assert code == 0, output
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2 * machines)]


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
        assert report["world_size"] == 2 and report["sharded"] == 1 and report["meshes"] == ["(2,)"]
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
    assert_same_adapter(*(load_file(folders[s] / file) for s in (True, False)))


def assert_same_adapter(sharded, whole):
    assert sharded.keys() == whole.keys()
    for name, weight in whole.items():
        # Adam makes a step, of 1e-3 here, of any gradient, and of one that is small more of its rounding.
        difference = (sharded[name] - weight).abs()
        assert difference.max() < 5e-5 and difference.mean() < 2e-6, name
    assert max(weight.abs().max() for name, weight in whole.items() if "lora_B" in name) > 1e-4


KEPT = {"FSDP_RESHARD_AFTER_FORWARD": "false"}


def test_what_stays_gathered_learns_the_same(model_folder, tmp_path):
    """accelerate's `fsdp_reshard_after_forward: false`, in bf16, where passes could share what autocast makes."""
    file, adapters = "pytorch_lora_weights.safetensors", []
    for environment in ({}, KEPT):
        folder = tmp_path / f"kept-{bool(environment)}"
        reports = run(model_folder, folder, environment=environment, mixed_precision="bf16")
        assert all(report["sharded"] == 1 and report["gathered"] == [bool(environment)] for report in reports)
        adapters.append(load_file(folder / file))
    assert all(torch.equal(adapters[1][name], weight) for name, weight in adapters[0].items())
    assert all(report["whole_gradients"] == [False] for report in reports)


@pytest.mark.slow
def test_compiled_blocks_learn_the_same(runs, model_folder, tmp_path):
    """Where it is asked for: whether it gains on GPUs is not known, so that it is off by default."""
    reports = run(model_folder, tmp_path, worker="traced_worker", compile=True)
    assert [report["sharded"] for report in reports] == [1, 1]
    file = "pytorch_lora_weights.safetensors"
    assert_same_adapter(load_file(tmp_path / file), load_file(runs[0][False] / file))


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


# Two launchers of two processes each, and one batch a process: as many samples as in the other runs.
TWO_MACHINES = {"machines": 2, "batches_per_epoch": 1}


@pytest.fixture(scope="module")
def two_machines(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("machines")
    return folder, run(model_folder, folder, **TWO_MACHINES)


def test_two_machines_have_a_model_each(runs, two_machines):
    folders, _ = runs
    folder, reports = two_machines
    for report in reports:
        assert report["world_size"] == 4 and report["sharded"] == 1 and report["meshes"] == ["(2, 2)"]
        assert report["adapters"] == ["default", "ema", "old", "reference"]
        assert report["local"] < 0.6
    for name in ("checkpoint-1", "checkpoint-2"):
        file = f"checkpoints/{name}/pytorch_lora_weights.safetensors"
        assert_same_adapter(*(load_file(path / file) for path in (folder, folders[False])))
    ours, theirs = ((path / "metrics.jsonl").read_text().splitlines() for path in (folder, folders[False]))
    for a, b in zip(map(json.loads, ours), map(json.loads, theirs), strict=True):
        for key in ("reward", "loss", "kl", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-6)


def test_gradients_of_several_passes_are_never_whole(runs, model_folder, tmp_path):
    """Four passes a step, and two machines: only the last one's are averaged between them."""
    values = {"machines": 2, "train_batch_size": 1, "blocks_per_pass": 1, "environment": KEPT}
    reports = run(model_folder, tmp_path / "run", **values)
    assert all(report["meshes"] == ["(2, 2)"] and report["whole_gradients"] == [False] for report in reports)
    for name in ("checkpoint-1", "checkpoint-2"):
        file = f"checkpoints/{name}/pytorch_lora_weights.safetensors"
        assert_same_adapter(*(load_file(path / file) for path in (tmp_path / "run", runs[0][False])))


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
def test_resuming_is_exact(runs, two_machines, machines, model_folder, tmp_path):
    folders, _ = runs
    folder, options = (folders[True], {}) if machines == 1 else (two_machines[0], TWO_MACHINES)
    run(model_folder, tmp_path / "run", max_train_steps=1, **options)
    run(model_folder, tmp_path / "run", resume_from_checkpoint="latest", **options)
    resumed, whole = (load_file(path / "pytorch_lora_weights.safetensors") for path in (tmp_path / "run", folder))
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


# Held-out videos whose passes differ: the second scene comes by two transitions, with the second block or the third.
SCENES = {
    "train": ["a red circle [0.75s] | a green cross", "a blue square [0.75s] | a red cross"],
    "test": ["a red cross [0.75s] | a circle", "a blue cross [1.5s] | a square", "a red square [0.75s] | a cross"],
}
SWITCHES = {"transitions": "roll,recache", "switch_prompts": "scenes", "window_size": 3, "window_selection": "last"}
SWITCHES |= {"eval_num_frames": 33, "num_eval_prompts": 3, "num_eval_videos": 3}
SWITCHES |= {"train_batch_size": 1, "batches_per_epoch": 3, "samples_per_prompt": 3, "shared_past": True}


@pytest.fixture(scope="module")
def troubled(model_folder, tmp_path_factory):
    """What the two processes of sharded_rollout_worker.py say, what is printed, and a trainer that is whole."""
    folder = tmp_path_factory.mktemp("troubled")
    (folder / "prompts").mkdir()
    for split, texts in SCENES.items():
        (folder / "prompts" / f"{split}.txt").write_text("\n".join(texts))
    values = SWITCHES | {"prompts": folder / "prompts"}
    whole = make_trainer(tiny_arguments(model_folder, folder / "whole", **values))
    arguments = tiny_arguments(model_folder, folder / "shards", **values)
    _, output = Torchrun("tests/training/sharded_rollout_worker.py", folder, *arguments, **FSDP).finish()
    files = [folder / f"rank{rank}.json" for rank in range(2)]
    assert all(file.is_file() for file in files), output
    with whole.resources:
        yield [json.loads(file.read_text()) for file in files], output, whole


def test_switches_of_held_out_videos(troubled, tmp_path):
    """Processes make videos with as many passes at the same time."""
    reports, _, whole = troubled
    expected, _ = whole.held_out.evaluate(video_dir=tmp_path)
    assert len(set(expected.scores["reward"])) == 6
    for report in reports:
        assert report["scores"]["reward"] == pytest.approx(expected.scores["reward"], abs=1e-5)
    assert sorted(sum((report["written"] for report in reports), [])) == ["000.mp4", "001.mp4", "002.mp4"]


def test_shared_pasts_that_one_process_alone_needs(troubled):
    reports, _, whole = troubled
    expected = rollout_scores(whole)
    assert len(set(expected)) == 6
    for report in reports:
        assert report["rollout"] == pytest.approx(expected, abs=1e-5)


def test_trouble_of_one_process_between_passes_is_that_of_all(troubled):
    reports, _, _ = troubled
    for report in reports:
        assert report["signal"] == ["Interrupted", "SIGTERM"]
        assert report["reward"][0] == "UserError" and "a reward of one process" in report["reward"][1]


def test_error_of_one_process_in_its_passes_is_printed(troubled):
    _, output, _ = troubled
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert lines == ["error: process 1: a text of one process"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """What two processes say that load a pipeline, saved in float32, in parts and whole for a bf16 run."""
    folder = tmp_path_factory.mktemp("shards")
    sizes = {"num_attention_heads": 8, "ffn_dim": 512, "num_layers": 8}
    model = save_tiny_pipeline(folder / "model", **SMALL, **sizes)
    code, output = Torchrun("tests/distributed/shards_worker.py", model, folder, **FSDP).finish()
    assert code == 0, output
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_shards_are_parts_of_what_is_loaded_whole(shards):
    """The whole is loaded by diffusers. The adapters' values are drawn, and the same to the last bit."""
    for report in shards:
        assert report["sharded"] and report["names"] and report["identity"] and report["other"] == []
        assert report["dtypes"] == ["torch.bfloat16", "torch.float32"]
        assert report["buffers"] and all(report["buffers"])
        # A pipeline that is given is in memory.
        assert all(report["given"])


def test_no_process_holds_the_whole(shards):
    for report in shards:
        assert report["local"] < 0.51 * report["whole"]
        # The rest is small: the adapters before they are sharded, and the other models.
        assert report["peak"] < report["local"] + report["largest"] + 0.2 * report["whole"]
        assert report["whole_peak"] > report["whole"]


def test_a_policy_is_merged_in_shards(shards):
    """As in the whole, to the last bit, before FSDP's first pass and after; then weights are back."""
    for report in shards:
        assert all(report["early"]) and all(report["late"]) and report["back"]
        assert report["merged"] == 8 * 10  # all linear layers of the blocks


def test_shards_are_gathered_once_for_several_passes(shards):
    for report in shards:
        assert all(report["in_shards"]) and not any(report["gathered"]) and report["again_in_shards"]
        assert all(report["passes"]) and report["trainable"]
        assert report["gradients"] > 0


@pytest.mark.parametrize(
    "settings,found",
    [
        ({}, "None and None"),
        ({"FSDP_VERSION": "1", "FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}, "1 and FULL_SHARD"),
        ({"FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}, "2 and FULL_SHARD"),
    ],
)
def test_settings_of_fsdp1(monkeypatch, model_folder, tmp_path, settings, found):
    for name, value in ({"ACCELERATE_USE_FSDP": "true"} | settings).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"fsdp_version: 2, .* true or false; they are {found}"):
        make_trainer(tiny_arguments(model_folder, tmp_path))


def test_a_machine_has_a_model():
    assert mesh_sizes([8] * 8) == (1, 8)
    assert mesh_sizes([8] * 48) == (6, 8)
    assert mesh_sizes([1] * 3) == (3, 1)
    assert mesh_sizes([8] * 16, ParallelismConfig(dp_shard_size=16)) == (1, 16)
    assert mesh_sizes([8, 8, 4] * 4, ParallelismConfig(dp_replicate_size=3, dp_shard_size=4)) == (3, 4)


def test_meshes_that_cannot_be():
    with pytest.raises(UserError, match="machines have 4 to 8 processes: .* dp_replicate_size and dp_shard_size"):
        mesh_sizes([8] * 8 + [4] * 4)
    with pytest.raises(UserError, match="dp_replicate_size=2 and dp_shard_size=4, whose product must be the 16"):
        mesh_sizes([8] * 16, ParallelismConfig(dp_replicate_size=2, dp_shard_size=4, tp_size=2))


@pytest.mark.slow
def test_the_beginning_is_judged_anew(runs, model_folder, tmp_path):
    """Of a run that is resumed with more seeds: the first ones' scores are those of before, and shards come back."""
    folder, before = tmp_path / "run", runs[0][True]
    shutil.copytree(before, folder)
    run(model_folder, folder, eval_seeds=2, resume_from_checkpoint="latest")
    evaluations = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    assert [evaluation["step"] for evaluation in evaluations] == [0, 2, 0, 2]
    scores = [evaluation["scores"]["reward"] for evaluation in evaluations]
    for old, new in zip(scores[:2], scores[2:]):
        assert len(new) == 6 and new[:3] == pytest.approx(old, abs=1e-6)
    resumed, whole = (load_file(path / "pytorch_lora_weights.safetensors") for path in (folder, before))
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())
