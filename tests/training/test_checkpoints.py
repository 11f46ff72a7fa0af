import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

import astrolabe_diffusers  # noqa: F401  (DiffusionPipeline finds our classes)
from astrolabe_diffusers.training.checkpoints import WEIGHT_NAMES, Checkpoints, load_adapter, save_adapter
from astrolabe_diffusers.training.errors import UserError
from astrolabe_diffusers.training.policies import OLD, policy_parameters, use_policy
from tests.tiny_pipeline import tiny_pipeline
from tests.training.helpers import SIZE, policy_pipeline


@pytest.fixture(scope="module")
def pipe():
    return policy_pipeline()


@pytest.fixture
def checkpoints(pipe, tmp_path):
    accelerator = Accelerator(mixed_precision="no")
    accelerator.prepare(pipe.transformer)
    return Checkpoints(accelerator, pipe.transformer, tmp_path, total_limit=2)


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
    for adapter in WEIGHT_NAMES:
        save_adapter(pipe.transformer, tmp_path, adapter)
    other = policy_pipeline(randomize=False).transformer
    for adapter in WEIGHT_NAMES:
        load_adapter(other, tmp_path, adapter)
        pairs = zip(policy_parameters(other, adapter), policy_parameters(pipe.transformer, adapter), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    trainable = {name for name, p in other.named_parameters() if p.requires_grad}
    assert trainable and all(".default." in name for name in trainable)


def test_adapter_of_another_rank(pipe, tmp_path):
    save_adapter(policy_pipeline(rank=2).transformer, tmp_path)
    with pytest.raises(UserError, match="it has rank 2, this run has rank 4") as error:
        load_adapter(pipe.transformer, tmp_path)
    assert "\n" not in str(error.value)


def test_adapter_of_another_model(pipe, tmp_path):
    save_adapter(policy_pipeline(attention_head_dim=24).transformer, tmp_path)
    with pytest.raises(UserError, match="another model"):
        load_adapter(pipe.transformer, tmp_path)
    save_adapter(policy_pipeline(num_layers=1).transformer, tmp_path)
    with pytest.raises(UserError, match="does not fit this model.*blocks.1"):
        load_adapter(pipe.transformer, tmp_path)


def test_adapter_file_that_is_missing_or_no_such_file(pipe, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_adapter(pipe.transformer, tmp_path)
    (tmp_path / WEIGHT_NAMES["default"]).write_text("not safetensors")
    with pytest.raises(UserError, match="cannot read the adapter"):
        load_adapter(pipe.transformer, tmp_path)


def test_checkpoints_are_pruned_and_found(checkpoints):
    assert checkpoints.find("latest") is None
    for step in (9, 10, 11):
        checkpoints.save(step, {"step": step})
    assert [path.name for path in checkpoints.list()] == ["checkpoint-10", "checkpoint-11"]
    assert checkpoints.find("latest").name == "checkpoint-11"
    assert checkpoints.find("checkpoint-10") == checkpoints.find(str(checkpoints.folder / "checkpoint-10"))
    with pytest.raises(UserError, match="checkpoint-9.*checkpoint-10, checkpoint-11"):
        checkpoints.find("checkpoint-9")


def test_checkpoint_is_a_lora_folder_without_the_base(checkpoints, pipe):
    folder = checkpoints.save(1, {"step": 1})
    names = {path.name for path in folder.iterdir()}
    assert set(WEIGHT_NAMES.values()) | {"trainer_state.json"} <= names
    assert not any(name.startswith("model") for name in names)
    assert json.loads((folder / "trainer_state.json").read_text()) == {"step": 1}
    fresh = tiny_pipeline()
    fresh.load_lora_weights(folder)
    assert fresh.get_list_adapters() == {"transformer": ["default_0"]}


def test_unfinished_checkpoint_is_not_found_and_does_no_harm(checkpoints):
    checkpoints.save(1, {"step": 1})
    shutil.copytree(checkpoints.folder / "checkpoint-1", checkpoints.folder / "checkpoint-2.partial")
    (checkpoints.folder / "checkpoint-2.partial" / "left_over").touch()
    assert checkpoints.find("latest").name == "checkpoint-1"
    folder = checkpoints.save(2, {"step": 2})
    assert not (folder / "left_over").exists()
    assert {path.name for path in checkpoints.folder.iterdir()} == {"checkpoint-1", "checkpoint-2"}


def test_save_again_replaces(checkpoints):
    checkpoints.save(1, {"value": 1})
    checkpoints.save(1, {"value": 2})
    assert checkpoints.load(checkpoints.find("latest")) == {"value": 2}


def test_load_restores_both_adapters(checkpoints, pipe):
    expected = {adapter: [p.clone() for p in policy_parameters(pipe.transformer, adapter)] for adapter in WEIGHT_NAMES}
    folder = checkpoints.save(1, {"step": 1})
    for adapter in WEIGHT_NAMES:
        for parameter in policy_parameters(pipe.transformer, adapter):
            parameter.data.add_(1.0)
    assert checkpoints.load(folder) == {"step": 1}
    for adapter, parameters in expected.items():
        assert all(map(torch.equal, policy_parameters(pipe.transformer, adapter), parameters))


def test_checkpoint_with_a_foreign_adapter_is_one_line(checkpoints, pipe):
    folder = checkpoints.save(1, {"step": 1})
    path = folder / WEIGHT_NAMES[OLD]
    weights = load_file(path)
    save_file({name: value[:1] for name, value in weights.items()}, path)
    with pytest.raises(UserError, match="wrong size") as error:
        checkpoints.load(folder)
    assert "\n" not in str(error.value)


def test_pipeline_folder_and_adapter_together(model_folder, pipe, tmp_path):
    """What the README does: DiffusionPipeline.from_pretrained, then load_lora_weights."""
    save_adapter(pipe.transformer, tmp_path)
    fresh = DiffusionPipeline.from_pretrained(model_folder)
    fresh.set_progress_bar_config(disable=True)
    before = video(fresh)
    fresh.load_lora_weights(tmp_path)
    assert (video(fresh) - before).abs().max() > 1e-3
