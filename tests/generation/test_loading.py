import json

import pytest
import torch

from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.generation.loading import find_lora, load_loras, weights_digest
from astrolabe_diffusers.pipelines.loading import load_from
from astrolabe_diffusers.training.adapter_files import save_adapter
from tests.tiny_pipeline import save_tiny_pipeline, tiny_pipeline
from tests.training.helpers import policy_pipeline
from tests.training.test_checkpoints import plant


@pytest.fixture(scope="module")
def trained():
    """A transformer with two LoRAs."""
    return policy_pipeline().transformer


def test_folders_of_a_checkpoint_and_of_a_run(trained, tmp_path):
    run = tmp_path / "run"
    for step in (2, 10):
        save_adapter(trained, run / "checkpoints" / f"checkpoint-{step}")
    (run / "checkpoints" / "checkpoint-12.partial").mkdir()
    assert find_lora(str(run)) == str(run / "checkpoints" / "checkpoint-10")
    assert find_lora(str(run / "checkpoints" / "checkpoint-2")) == str(run / "checkpoints" / "checkpoint-2")
    save_adapter(trained, run)  # the run has finished
    assert find_lora(str(run)) == str(run)
    assert find_lora("someone/on-the-hub") == "someone/on-the-hub"


def test_digest_follows_the_weights(trained, tmp_path):
    save_adapter(trained, tmp_path, "default")

    def digest(weight):
        pipe = tiny_pipeline()
        if weight:
            load_loras(pipe, {str(tmp_path): weight})
        return weights_digest(pipe.transformer)

    plain, first = digest(0), digest(1)
    assert plain == digest(0) and first == digest(1) and plain != first
    changed = policy_pipeline(randomize=False).transformer
    save_adapter(changed, tmp_path, "default")
    assert digest(1) not in (plain, first)


@pytest.mark.parametrize("component", ["vae", "text_encoder"])
def test_digest_follows_the_other_weights(component):
    """A value of every tensor is enough for a model that was trained further: that changes them all."""

    def digest(change=lambda parameter: None):
        pipe = tiny_pipeline()
        *_, last = getattr(pipe, component).parameters()
        change(last.data)
        return weights_digest(pipe.transformer, pipe.vae, pipe.text_encoder)

    plain = digest()
    assert plain == digest() != digest(lambda parameter: parameter.add_(0.1))


def test_another_models_lora_is_refused(tmp_path):
    save_adapter(policy_pipeline(num_attention_heads=4).transformer, tmp_path)
    with pytest.raises(UserError, match="cannot load the LoRA .*another model's"):
        load_loras(tiny_pipeline(), {str(tmp_path): 1.0})


def test_another_pipeline_is_refused(tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        8, block_out_channels=(4,), norm_num_groups=2, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a DDPMPipeline, not a CausalWanPipeline"):
        load_from(str(tmp_path), dtype=torch.float32)


CODE = "import os\n\nos.mknod({mark!r})\nfrom diffusers import DiffusionPipeline as Own, ModelMixin as OwnModel\n"


@pytest.mark.parametrize(
    ("change", "file"),
    [
        ({"_class_name": ["own", "Own"]}, "own.py"),
        ({"transformer": ["own", "OwnModel"]}, "transformer/own.py"),
        ({"transformer": ["own_module", "OwnModel"]}, "own_module.py"),
    ],
)
def test_code_in_a_folder_is_not_run(tmp_path, monkeypatch, change, file):
    folder = save_tiny_pipeline(tmp_path / "tiny")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | change))
    mark = tmp_path / "mark"
    (folder / file).write_text(CODE.format(mark=str(mark)))
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match="cannot load") as error:
        load_from(str(folder), dtype=torch.float32)
    assert "\n" not in str(error.value) and not mark.exists()


@pytest.mark.parametrize("name", ["pytorch_lora_weights.bin", "lora.pt"])
def test_code_in_a_lora_is_not_run(tmp_path, name):
    mark = tmp_path / "mark"
    plant(tmp_path / name, mark, with_torch=True)
    pipe = tiny_pipeline()
    with pytest.raises(UserError, match="cannot load the LoRA"):
        load_loras(pipe, {str(tmp_path / name): 1.0})
    assert not mark.exists()
