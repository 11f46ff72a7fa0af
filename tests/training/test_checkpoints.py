import io
import json
import os
import pickle
import random
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

import astrolabe_diffusers  # noqa: F401  (DiffusionPipeline finds our classes)
from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.files.writing import seal
from astrolabe_diffusers.training.adapter_files import WEIGHT_NAMES, load_adapter, save_adapter
from astrolabe_diffusers.training.checkpoints import (
    Checkpoints,
    check_form,
    check_optimizer_tensors,
    load_optimizer,
    optimizer_tensors,
    policy_identity,
)
from astrolabe_diffusers.training.policies import OLD, policy_parameters, use_policy
from tests.tiny_pipeline import tiny_pipeline
from tests.training.helpers import SIZE, config, policy_pipeline


@pytest.fixture(scope="module")
def pipe():
    return policy_pipeline()


def make_checkpoints(transformer, folder, **identity):
    optimizer = torch.optim.AdamW(policy_parameters(transformer))
    settings = config(output_dir=folder, checkpoints_total_limit=2)
    return Checkpoints(transformer, optimizer, settings, policy_identity(transformer) | identity)


@pytest.fixture
def checkpoints(pipe, tmp_path):
    return make_checkpoints(pipe.transformer, tmp_path)


def latest(checkpoints):
    return checkpoints.find("latest")[0]


def video(pipe):
    return pipe(prompt="a red circle", generator=torch.Generator().manual_seed(0), output_type="pt", **SIZE).frames


def test_adapter_file_gives_the_policy_to_a_fresh_pipeline(pipe, tmp_path):
    save_adapter(pipe.transformer, tmp_path)
    save_adapter(pipe.transformer, tmp_path, OLD)
    with use_policy(pipe.transformer, "current"):
        expected = video(pipe)
    fresh = tiny_pipeline(**SIZE)
    assert (video(fresh) - expected).abs().max() > 1e-3
    fresh.load_lora_weights(tmp_path)  # takes the current policy's of the two files
    torch.testing.assert_close(video(fresh), expected, rtol=0, atol=1e-5)
    layer = fresh.transformer.blocks[0].attn1.to_q
    assert set(layer.scaling.values()) == {2.0}  # alpha / rank, neither 1 nor rank


def test_adapters_come_back_exactly(pipe, tmp_path):
    for adapter in pipe.transformer.peft_config:
        save_adapter(pipe.transformer, tmp_path, adapter)
    other = policy_pipeline(randomize=False).transformer
    for adapter in pipe.transformer.peft_config:
        load_adapter(other, tmp_path, adapter)
        pairs = zip(policy_parameters(other, adapter), policy_parameters(pipe.transformer, adapter), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    trainable = {name for name, p in other.named_parameters() if p.requires_grad}
    assert trainable and all(".default." in name for name in trainable)


def test_adapter_of_another_rank(pipe, tmp_path):
    save_adapter(policy_pipeline(rank=2).transformer, tmp_path)
    with pytest.raises(UserError, match="of another shape") as error:
        load_adapter(pipe.transformer, tmp_path)
    assert "\n" not in str(error.value)


def test_adapter_of_another_model(pipe, tmp_path):
    save_adapter(policy_pipeline(attention_head_dim=24).transformer, tmp_path)
    with pytest.raises(UserError, match="another model"):
        load_adapter(pipe.transformer, tmp_path)
    save_adapter(policy_pipeline(num_layers=1).transformer, tmp_path)
    with pytest.raises(UserError, match="other lora_target_modules: .* missing .*blocks.1"):
        load_adapter(pipe.transformer, tmp_path)


def test_adapter_file_that_is_missing_or_no_such_file(pipe, tmp_path):
    with pytest.raises(UserError, match="cannot read the adapter .*No such file"):
        load_adapter(pipe.transformer, tmp_path)
    (tmp_path / WEIGHT_NAMES["default"]).write_text("not safetensors")
    with pytest.raises(UserError, match="cannot read the adapter"):
        load_adapter(pipe.transformer, tmp_path)


def test_checkpoints_are_pruned_and_found(checkpoints):
    assert checkpoints.find("latest") == checkpoints.find(None) == (None, [])
    for step in (9, 10, 11):
        checkpoints.save(step, {"step": step})
    assert {path.name for path in checkpoints.folder.iterdir()} == {"checkpoint-10", "checkpoint-11"}
    assert latest(checkpoints).name == "checkpoint-11"
    with pytest.raises(UserError, match="checkpoint-9.*checkpoint-10, checkpoint-11"):
        checkpoints.find("checkpoint-9")
    path, lines = checkpoints.find(str(checkpoints.folder / "checkpoint-10"))
    assert path.name == "checkpoint-10" and lines == ["set aside, as .set_aside: checkpoint-11"]
    assert checkpoints.find("checkpoint-10") == (path, [])


def test_checkpoint_is_a_lora_folder_without_the_base(checkpoints, pipe):
    folder = checkpoints.save(1, {"step": 1})
    names = {path.name for path in folder.iterdir()}
    assert {WEIGHT_NAMES["default"], WEIGHT_NAMES["old"], "trainer_state.json", "config.yaml", "files.json"} <= names
    assert not any(name.startswith("model") for name in names)
    assert json.loads((folder / "trainer_state.json").read_text())["step"] == 1
    fresh = tiny_pipeline()
    fresh.load_lora_weights(folder)
    assert fresh.get_list_adapters() == {"transformer": ["default_0"]}


def test_left_overs_of_a_kill_are_removed(checkpoints):
    """A kill while writing, and a kill while pruning."""
    checkpoints.save(1, {"step": 1})
    checkpoints.save(2, {"step": 2}).rename(checkpoints.folder / "checkpoint-2.partial")
    (checkpoints.folder / "checkpoint-0.partial").mkdir()
    assert checkpoints.find("latest")[0].name == "checkpoint-1"
    assert [path.name for path in checkpoints.folder.iterdir()] == ["checkpoint-1"]
    checkpoints.save(2, {"step": 2})


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[random.Random(0).randrange(len(content))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [Path.unlink, truncate, flip_a_bit])
def test_any_damage_to_the_newest_falls_back_to_the_one_before(checkpoints, damage):
    checkpoints.save(1, {"step": 1})
    names = [path.name for path in checkpoints.save(2, {"step": 2}).iterdir()]
    assert len(names) >= 5
    for name in names:
        damage(checkpoints.path(2) / name)
        with pytest.raises(UserError, match="checkpoint-2 is damaged"):
            checkpoints.find("checkpoint-2")
        path, lines = checkpoints.find("latest")
        assert path.name == "checkpoint-1"
        assert "checkpoint-2 is damaged: " in lines[0] and "set aside" in lines[1]
        assert name in lines[0] or name == "files.json"
        checkpoints.save(2, {"step": 2})
        assert checkpoints.find("latest")[0].name == "checkpoint-2"


def test_a_run_that_starts_anew_does_not_go_on_from_another_runs_checkpoints(checkpoints):
    checkpoints.save(8, {"step": 8})
    assert checkpoints.find(None) == (None, ["set aside, as .set_aside: checkpoint-8"])
    checkpoints.save(2, {"step": 2})
    assert latest(checkpoints).name == "checkpoint-2"
    assert (checkpoints.folder / "checkpoint-8.set_aside" / WEIGHT_NAMES["default"]).is_file()


def test_every_checkpoint_that_was_set_aside_stays(checkpoints):
    for times in (1, 2, 3):
        checkpoints.save(8, {"step": 8, "times": times})
        checkpoints.find(None)
    names = ("checkpoint-8.set_aside", "checkpoint-8.set_aside-2", "checkpoint-8.set_aside-3")
    assert {path.name for path in checkpoints.folder.iterdir()} == set(names)
    states = [json.loads((checkpoints.folder / name / "trainer_state.json").read_text()) for name in names]
    assert [state["times"] for state in states] == [1, 2, 3]


def test_state_of_another_model_or_lora_is_refused(checkpoints, pipe):
    checkpoints.save(1, {"step": 1})
    folder = checkpoints.config.output_dir
    for name, value in {"rank": 8, "lora_target_modules": ["to_q"], "adapters": ["default", "old", "ema"]}.items():
        with pytest.raises(UserError, match=f"another run: {name} is .* there and") as error:
            make_checkpoints(pipe.transformer, folder, **{name: value}).find("latest")
        assert "\n" not in str(error.value)
    base = next(p for name, p in pipe.transformer.named_parameters() if name.endswith("base_layer.weight"))
    base.data[0, 0] += 0.1
    try:
        with pytest.raises(UserError, match="base model is"):
            make_checkpoints(pipe.transformer, folder).find("latest")
    finally:
        base.data[0, 0] -= 0.1


def test_every_adapter_is_saved_and_restored(tmp_path):
    pipe = policy_pipeline()
    pipe.transformer.add_adapter(pipe.transformer.peft_config["old"], adapter_name="ema")
    pipe.transformer.set_adapter("default")
    for parameter in policy_parameters(pipe.transformer, "ema"):
        parameter.data.normal_()
    expected = [p.clone() for p in policy_parameters(pipe.transformer, "ema")]
    checkpoints = make_checkpoints(pipe.transformer, tmp_path)
    folder = checkpoints.save(1, {"step": 1})
    for parameter in policy_parameters(pipe.transformer, "ema"):
        parameter.data.zero_()
    checkpoints.load(folder, {"step": 0})
    assert len(expected) and all(map(torch.equal, policy_parameters(pipe.transformer, "ema"), expected))


def test_load_restores_both_adapters(checkpoints, pipe):
    adapters = pipe.transformer.peft_config
    expected = {adapter: [p.clone() for p in policy_parameters(pipe.transformer, adapter)] for adapter in adapters}
    folder = checkpoints.save(1, {"step": 1})
    for adapter in pipe.transformer.peft_config:
        for parameter in policy_parameters(pipe.transformer, adapter):
            parameter.data.add_(1.0)
    assert checkpoints.load(folder, {"step": 0})["step"] == 1
    for adapter, parameters in expected.items():
        assert all(map(torch.equal, policy_parameters(pipe.transformer, adapter), parameters))


def seal_anew(folder):
    (folder / "files.json").unlink()
    seal(folder)


def test_random_states_of_earlier_checkpoints_are_passed_over(checkpoints):
    """Of processes that this run need not have; whatever is in them."""
    folder = checkpoints.save(1, {"step": 1})
    (folder / "random_states_0.json").write_text(json.dumps({"python": [3, [1, 2], None], "torch": [1]}))
    (folder / "random_states_7.json").write_text("none")
    seal_anew(folder)
    before = torch.get_rng_state()
    assert checkpoints.load(latest(checkpoints), {"step": 0}) == {"step": 1}
    assert torch.equal(torch.get_rng_state(), before)


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mknod, (str(self.mark),)


def plant(path, mark, with_torch):
    """A pickle that runs code, plain or in a file of torch, and that it does."""
    torch.save(Evil(mark), path) if with_torch else path.write_bytes(pickle.dumps({"state": Evil(mark)}))
    content = path.read_bytes()
    torch.load(io.BytesIO(content), weights_only=False) if with_torch else pickle.loads(content)
    mark.unlink()


# What accelerate reads of a folder, as pickles, and what diffusers falls back to.
FOREIGN = ["optimizer.bin", "scheduler.bin", "random_states_0.pkl", "scaler.pt", "custom_checkpoint_0.pkl"]
FOREIGN += ["custom_checkpoint_1.pkl", "sampler.bin", "pytorch_model.bin", "pytorch_lora_weights.bin"]


@pytest.mark.parametrize("with_torch", [False, True])
def test_nothing_of_a_checkpoint_is_run(checkpoints, tmp_path, with_torch):
    """Pickles in the place of each of its files, and beside them, under a seal that fits."""
    mark = tmp_path / "mark"
    folder = checkpoints.save(1, {"step": 1})
    for name in FOREIGN:
        plant(folder / name, mark, with_torch)
    seal_anew(folder)
    checkpoints.load(checkpoints.find("latest")[0], {"step": 0})
    names = {path.name for path in folder.iterdir()} - {*FOREIGN, "files.json", "config.yaml"}
    assert len(names) == 4
    for name in names:
        content = (folder / name).read_bytes()
        plant(folder / name, mark, with_torch)
        seal_anew(folder)
        with pytest.raises(UserError, match=name) as error:
            checkpoints.load(checkpoints.find("latest")[0], {"step": 0})
        assert "\n" not in str(error.value) and not mark.exists()
        (folder / name).write_bytes(content)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("trainer_state.json", "[1, 2]", "trainer_state.json is no state of a run"),
        ("trainer_state.json", "{", "trainer_state.json is no JSON"),
        ("trainer_state.json", "[" * 100_000, "trainer_state.json is no JSON"),
        ("trainer_state.json", {"step": "two"}, "trainer_state.json is no state of a run"),
        ("trainer_state.json", {"step": -2}, "trainer_state.json is no state of a run"),
        ("trainer_state.json", {"identity": [1]}, "trainer_state.json is no state of a run"),
        ("trainer_state.json", {"identity": {"rank": [1, {}]}}, "another run: rank is 1, {} there"),
        ("trainer_state.json", {"guard": 7}, "trainer_state.json is no state of this run: it must have step, not"),
        ("trainer_state.json", {"format": 99}, r"written by another version \(format 99\)"),
        ("optimizer.safetensors", "{}", "optimizer.safetensors does not fit this run"),
    ],
)
def test_other_content_under_a_seal_that_fits(checkpoints, name, text, message):
    folder = checkpoints.save(1, {"step": 1})
    if isinstance(text, dict):
        text = json.dumps(json.loads((folder / name).read_text()) | text)
    (folder / name).write_text(text)
    seal_anew(folder)
    with pytest.raises(UserError, match=message) as error:
        checkpoints.load(checkpoints.find("latest")[0], {"step": 0})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[1]", '{"config.yaml": 3}', '{"config.yaml": {"bytes": 1}}', "7", "null"])
def test_a_list_of_files_that_is_none(checkpoints, text):
    folder = checkpoints.save(1, {"step": 1})
    (folder / "files.json").write_text(text)
    with pytest.raises(UserError, match="damaged: files.json is no list of files"):
        checkpoints.find(folder.name)
    assert "files.json is no list of files" in checkpoints.find("latest")[1][0]


def test_a_checkpoint_of_an_older_version_says_how_to_go_on(checkpoints, pipe):
    folder = checkpoints.save(1, {"step": 1})
    state = json.loads((folder / "trainer_state.json").read_text())
    del state["format"]
    (folder / "trainer_state.json").write_text(json.dumps(state))
    seal_anew(folder)
    with pytest.raises(UserError, match="written by version 0.1.0.*--init_lora .*checkpoint-1, with another") as error:
        checkpoints.find("latest")
    assert "\n" not in str(error.value)
    tiny_pipeline().load_lora_weights(folder)  # what --init_lora does with it


def test_moments_come_back_and_files_may_be_read_only(tmp_path):
    transformer = policy_pipeline().transformer
    checkpoints = make_checkpoints(transformer, tmp_path)
    for parameter in policy_parameters(transformer):
        parameter.grad = torch.ones_like(parameter)
    checkpoints.optimizer.step()
    state = checkpoints.optimizer.state_dict()["state"]
    expected = {i: {name: value.clone() for name, value in part.items()} for i, part in state.items()}
    folder = checkpoints.save(1, {"step": 1})
    for path in folder.iterdir():
        path.chmod(0o400)
    again = make_checkpoints(transformer, tmp_path)
    again.load(again.find("latest")[0], {"step": 0})
    state = again.optimizer.state_dict()["state"]
    assert len(state) == len(expected) > 0
    assert all(torch.equal(state[i][name], value) for i, part in expected.items() for name, value in part.items())


def test_checkpoint_with_a_foreign_adapter_is_one_line(checkpoints, pipe):
    folder = checkpoints.save(1, {"step": 1})
    path = folder / WEIGHT_NAMES[OLD]
    weights = load_file(path)
    save_file({name: value[:1] for name, value in weights.items()}, path)
    with pytest.raises(UserError, match="of another shape") as error:
        checkpoints.load(folder, {"step": 0})
    assert "\n" not in str(error.value)


def test_pipeline_folder_and_adapter_together(model_folder, tmp_path):
    """What the README does: DiffusionPipeline.from_pretrained, then load_lora_weights."""
    save_adapter(policy_pipeline(num_layers=1).transformer, tmp_path)
    fresh = DiffusionPipeline.from_pretrained(model_folder)
    fresh.set_progress_bar_config(disable=True)
    before = video(fresh)
    fresh.load_lora_weights(tmp_path)
    assert (video(fresh) - before).abs().max() > 1e-3


def steps(parameters, optimizer, number, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        parameters["idle"].grad = None
        optimizer.step()


def parameters_and_optimizer(**settings):
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 2), "b": (5,), "idle": (2,)}
    parameters = {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    return parameters, torch.optim.AdamW(parameters.values(), **settings)


def test_an_optimizer_goes_on_as_if_nothing_had_been():
    """Against one that is never stopped, and the state that torch itself would keep."""
    parameters, optimizer = parameters_and_optimizer(lr=0.1)
    steps(parameters, optimizer, 3, seed=1)
    tensors = {name: value.clone() for name, value in optimizer_tensors(parameters, optimizer).items()}
    assert set(tensors) == {f"{name}.{moment}" for name in "ab" for moment in ("step", "exp_avg", "exp_avg_sq")}
    again, other = parameters_and_optimizer(lr=0.1)
    for name, parameter in again.items():
        parameter.data.copy_(parameters[name].data)
    check_optimizer_tensors(tensors, again)
    load_optimizer(tensors, again, other)
    expected = optimizer.state_dict()["state"]
    assert other.state_dict()["state"].keys() == expected.keys()
    for index, state in expected.items():
        assert all(torch.equal(value, other.state_dict()["state"][index][name]) for name, value in state.items())
    steps(parameters, optimizer, 2, seed=2)
    steps(again, other, 2, seed=2)
    assert all(torch.equal(parameters[name], again[name]) for name in parameters)
    # A state without moments is that of before the first step.
    load_optimizer({}, again, other)
    assert not other.state_dict()["state"]


def test_settings_of_a_run_go_before_those_of_its_checkpoint():
    parameters, optimizer = parameters_and_optimizer(lr=0.1)
    steps(parameters, optimizer, 1, seed=1)
    again, other = parameters_and_optimizer(lr=0.02, weight_decay=0.3, betas=(0.5, 0.6))
    load_optimizer(optimizer_tensors(parameters, optimizer), again, other)
    (group,) = other.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.02, 0.3, (0.5, 0.6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.exp_avg": torch.zeros(2, 3)}, r"1 of another shape \(a.exp_avg \(2, 3\) for \(3, 2\)\)"),
        ({"b.exp_avg": torch.zeros(5, dtype=torch.int32)}, "b.exp_avg is torch.int32, not float32"),
        ({"a.step": torch.ones(1)}, r"a.step \(1,\) for \(\)"),
        ({"a.step": None}, r"1 missing \(a.step\)"),
        ({"c.step": torch.ones(())}, r"1 unexpected \(c.step\)"),
    ],
)
def test_moments_that_do_not_fit(change, message):
    parameters, optimizer = parameters_and_optimizer()
    steps(parameters, optimizer, 1, seed=1)
    tensors = optimizer_tensors(parameters, optimizer) | change
    with pytest.raises(ValueError, match=message):
        check_optimizer_tensors({name: value for name, value in tensors.items() if value is not None}, parameters)


LIKE = {"step": 3, "seconds": 1.5, "guard": {"norm": None}, "buffer": []}


def test_a_state_of_the_right_form():
    check_form(LIKE, LIKE)
    check_form({"step": 0, "seconds": 2, "guard": {"norm": 0.5}, "buffer": [1, 0.5]}, LIKE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "3"}, "step must be a whole number from 0, not '3'"),
        ({"step": -1}, "step must be"),
        ({"step": True}, "step must be"),
        ({"step": 1.0}, "step must be"),
        ({"seconds": "long"}, "seconds must be a number"),
        ({"seconds": float("nan")}, "seconds must be a number"),
        ({"guard": []}, r"guard must have norm, not \[\]"),
        ({"guard": {"norm": [1]}}, r"guard.norm must be a number, not \[1\]"),
        ({"buffer": {"a": 1}}, "buffer must be a list of numbers"),
        ({"buffer": ["1"]}, "buffer must be a list of numbers"),
        ({"more": 1}, "it must have step, seconds, guard, buffer"),
    ],
)
def test_a_state_of_another_form(change, message):
    with pytest.raises(ValueError, match=message):
        check_form(LIKE | change, LIKE)
