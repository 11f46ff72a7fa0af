"""Runs with `prompt_embeds_dir`: the same numbers, and no text encoder where all embeddings are there."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

from astrolabe_diffusers import CausalWanPipeline
from astrolabe_diffusers.cli.train import parse_args
from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.training import NFTConfig, NFTTrainer
from tests.tiny_pipeline import tiny_pipeline
from tests.training.helpers import numbers_of_run, tiny_arguments


pytestmark = pytest.mark.usefixtures("no_charts", "own_precision")


@pytest.fixture
def loads(monkeypatch):
    """A text encoder that is loaded is noted here."""
    loads, load = [], UMT5EncoderModel.from_pretrained
    monkeypatch.setattr(
        UMT5EncoderModel, "from_pretrained", lambda *args, **kwargs: loads.append(1) or load(*args, **kwargs)
    )
    return loads


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_the_next_run_loads_no_text_encoder(mixed_precision, model_folder, tmp_path, loads):
    def run(name, **values):
        values |= {"mixed_precision": mixed_precision, "num_frames": 9}
        trainer = NFTTrainer(config=parse_args(tiny_arguments(model_folder, tmp_path / name, **values)))
        trainer.train()
        return trainer, numbers_of_run(tmp_path / name)

    embeds = tmp_path / "embeds"
    _, expected = run("without")
    first, numbers = run("first", prompt_embeds_dir=embeds)
    assert numbers == expected and len(loads) == 2
    second, numbers = run("second", prompt_embeds_dir=embeds)
    assert numbers == expected and len(loads) == 2
    assert first.pipeline.text_encoder is None and second.pipeline.text_encoder is None
    # Two held-out prompts, and of the six others one for each of two epochs.
    assert len(list(embeds.glob("*/*.safetensors"))) == 4
    longer, _ = run("longer", prompt_embeds_dir=embeds, max_train_steps=3)
    assert len(loads) == 3 and len(list(embeds.glob("*/*.safetensors"))) == 5


def test_another_text_encoder_finds_nothing(model_folder, tmp_path, loads):
    """One weight is another one."""
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    file = other / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    weights["encoder.final_layer_norm.weight"][0] += 1
    save_file(weights, file, metadata={"format": "pt"})
    for model in (model_folder, other):
        config = parse_args(tiny_arguments(model, tmp_path / model.name, prompt_embeds_dir=tmp_path / "embeds"))
        trainer = NFTTrainer(config=config)
        texts = [sample.prompt.text for sample in trainer.held_out.samples]
        embeds = trainer.rollouts.encoder(texts)
        assert torch.equal(embeds, CausalWanPipeline.from_pretrained(model).encode_prompt(texts))
        trainer.end()


def test_a_pipeline_has_its_text_encoder_already(tmp_path):
    config = NFTConfig(output_dir=str(tmp_path / "run"), prompt_embeds_dir=str(tmp_path / "embeds"))
    with pytest.raises(UserError, match="prompt_embeds_dir knows a text encoder by its files"):
        NFTTrainer(tiny_pipeline(), config, train_prompts=[f"a {i}" for i in range(50)])


def test_a_folder_that_cannot_be_written(model_folder, tmp_path):
    (tmp_path / "file").touch()
    config = parse_args(tiny_arguments(model_folder, tmp_path / "run", prompt_embeds_dir=tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write .*file"):
        NFTTrainer(config=config)


def test_a_folder_without_a_text_encoder(model_folder, tmp_path):
    """One is needed for what is not stored."""
    CausalWanPipeline.from_pretrained(model_folder, text_encoder=None, tokenizer=None).save_pretrained(tmp_path / "m")
    values = {"prompts": model_folder / "prompts", "prompt_embeds_dir": tmp_path / "embeds"}
    config = parse_args(tiny_arguments(tmp_path / "m", tmp_path / "run", **values))
    with pytest.raises(UserError, match="cannot load .*without tokenizer and text_encoder: load it with them.$"):
        NFTTrainer(config=config)
