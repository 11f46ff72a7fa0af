"""Runs of a model with a second expert that writes the cache: which adapters they write, and what they refuse."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from astrolabe_diffusers import CausalWanPipeline, NFTConfig, NFTTrainer
from astrolabe_diffusers.cli.train import main
from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.models.kv_cache_clip import ClipKVCache
from astrolabe_diffusers.training.forward_process.predictors import check_context
from tests.own_transformer import OwnTransformer
from tests.tiny_pipeline import SMALL, tiny_pipeline, write_prompt_folder
from tests.training.helpers import BRIGHTNESS, config, tiny_arguments, tiny_settings
from tests.two_experts import WINDOWS, two_expert_pipeline


pytestmark = pytest.mark.usefixtures("no_charts")

BOTH = ("transformer", "memory_transformer")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    two_expert_pipeline(**SMALL, **WINDOWS["chunkwise"], sigmas=[1.0, 0.5], num_frames=21).save_pretrained(folder)
    write_prompt_folder(folder / "prompts")
    return folder


RUNS = {
    "transformer": {"context": "clean"},
    "memory_transformer": {"context": "clean_grad"},
    "both": {"context": "clean_grad", "gradient_checkpointing": "full", "ema_decay": 0.5},
}


@pytest.mark.parametrize("lora_expert", RUNS)
def test_a_run(lora_expert, model_folder, tmp_path):
    """From the start, from its checkpoint and from its LoRA, whose file names the experts."""
    components = BOTH if lora_expert == "both" else (lora_expert,)
    settings = {"lora_expert": lora_expert, "num_frames": 33, **RUNS[lora_expert]}
    assert main(tiny_arguments(model_folder, tmp_path / "run", **settings)) == 0
    lora = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    assert {key.split(".")[0] for key in lora} == set(components)
    # All has learnt, but what nobody sees.
    still = {key.split(".lora_")[0] for key, value in lora.items() if "lora_B" in key and not value.any()}
    assert all(name.startswith("memory_transformer.blocks.1.") for name in still)
    assert {key.split(".lora_")[0] for key in lora} != still
    pipe = CausalWanPipeline.from_pretrained(model_folder)
    pipe.load_lora_weights(tmp_path / "run")
    assert pipe.get_list_adapters().keys() == set(components)
    rank = {expert.peft_config["default_0"].r for name, expert in pipe.experts.items() if name in components}
    assert rank == {4}

    again = {**settings, "max_train_steps": 3, "resume_from_checkpoint": "latest"}
    assert main(tiny_arguments(model_folder, tmp_path / "run", **again)) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 3
    start = {**settings, "max_train_steps": 1, "init_lora": tmp_path / "run"}
    assert main(tiny_arguments(model_folder, tmp_path / "next", **start)) == 0
    after = load_file(tmp_path / "next" / "pytorch_lora_weights.safetensors")
    assert after.keys() == lora.keys()


def test_a_checkpoint_of_other_experts(model_folder, tmp_path, capsys):
    assert main(tiny_arguments(model_folder, tmp_path, max_train_steps=1)) == 0
    other = {"lora_expert": "both", "context": "clean_grad", "resume_from_checkpoint": "latest"}
    assert main(tiny_arguments(model_folder, tmp_path, **other)) == 2
    message = "experts with a LoRA is transformer there and transformer, memory_transformer here"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("lora_expert", ["memory_transformer", "both"])
def test_a_setting_that_would_train_nothing(lora_expert):
    with pytest.raises(UserError, match="the memory transformer learns nothing with context=clean, .*clean_grad"):
        NFTConfig(rewards={BRIGHTNESS: 1.0}, lora_expert=lora_expert)


def test_a_window_of_two_experts():
    pair = two_expert_pipeline(**WINDOWS["chunkwise"]).denoiser
    with pytest.raises(UserError, match="trains whole videos of two experts: no window_size or sample_frames"):
        check_context(config(context="clean_grad"), pair, has_past=True)
    x = torch.zeros(1, 4, 3, 4, 4)
    with pytest.raises(ValueError, match="with two experts these are whole videos"):
        pair(x, x[:, 0, 0, 0, 0], x, kv_cache=ClipKVCache(1), kv_cache_mode="read", clean_hidden_states=x)


@pytest.mark.parametrize("context", ["noisy", "clean_grad"])
def test_a_memory_bank_has_clean_blocks_one_by_one(context):
    model = tiny_pipeline(local_attn_size=6, memory_bank_size=2).transformer
    with pytest.raises(UserError, match="memory bank is made block by block, .*train with context=clean"):
        check_context(config(context=context), model)


def test_what_lies_before_noisy_context(model_folder, tmp_path):
    longer = {"context": "noisy", "num_frames": 9, "sample_frames": 6}
    settings = tiny_settings(str(model_folder), str(tmp_path), rewards={BRIGHTNESS: 1.0}, eval_rewards=[])
    pipe = tiny_pipeline(**SMALL)
    prompts = {"train_prompts": ["a red circle", "a blue square"], "eval_prompts": ["a green cross"]}
    with pytest.raises(UserError, match="context=noisy trains a whole video in one pass: no sample_frames"):
        NFTTrainer(pipe, NFTConfig(**settings | longer), **prompts)


def test_what_a_user_gets_wrong(model_folder, tmp_path):
    settings = tiny_settings(str(model_folder), str(tmp_path), rewards={BRIGHTNESS: 1.0}, eval_rewards=[])
    run = NFTConfig(**settings)
    with pytest.raises(UserError, match="context=noisy has no pass of the memory transformer"):
        NFTTrainer(config=replace(run, context="noisy"))
    plain = tiny_pipeline(**SMALL)
    memory = replace(run, lora_expert="memory_transformer", context="clean_grad")
    prompts = {"train_prompts": ["a red circle", "a blue square"], "eval_prompts": ["a green cross"]}
    with pytest.raises(UserError, match="lora_expert=memory_transformer: this model has no memory_transformer"):
        NFTTrainer(plain, memory, **prompts)
    a, b = torch.ones(4, 24), torch.ones(24, 4)
    lora = {"blocks.0.attn1.to_k.lora_A.weight": a, "blocks.0.attn1.to_k.lora_B.weight": b}
    CausalWanPipeline.save_lora_weights(tmp_path / "lora", memory_transformer_lora_layers=lora)
    with pytest.raises(UserError, match="it is of memory_transformer, and lora_expert says transformer"):
        NFTTrainer(config=replace(run, init_lora=str(tmp_path / "lora")))
    with pytest.raises(UserError, match="needs a transformer that takes `clean_hidden_states`"):
        check_context(config(context="clean_grad"), OwnTransformer())
