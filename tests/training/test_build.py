import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from datasets import Dataset, load_dataset
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file

from astrolabe_diffusers.distributed.accelerator import accelerate_settings, check_precision
from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.pipelines.loading import load_from, load_frozen_pipeline, video_size
from astrolabe_diffusers.rollout.prompts import Prompt
from astrolabe_diffusers.training.build import load_prompts, make_accelerator, set_recipe
from tests.models.test_transformer_causal_wan import MODEL_ONLY
from tests.tiny_pipeline import save_tiny_pipeline, tiny_pipeline
from tests.training.helpers import config


def recipe(pipe):
    transformer, pipeline = pipe.transformer.config, pipe.config
    return transformer.local_attn_size, transformer.sink_size, pipeline.sigmas, pipeline.num_context_frames


def video(pipe):
    """Latents of three blocks."""
    generator = torch.Generator().manual_seed(0)
    return pipe("a red circle", num_frames=33, generator=generator, output_type="latent").frames


def test_a_window_is_that_of_a_model_made_with_it():
    pipe = tiny_pipeline()
    before = video(pipe)
    set_recipe(pipe, config(local_attn_size=6, sink_size=3))
    after = video(pipe)
    assert torch.equal(after, video(tiny_pipeline(local_attn_size=6, sink_size=3)))
    assert torch.equal(after[:, :, :6], before[:, :, :6]) and not torch.equal(after[:, :, 6:], before[:, :, 6:])


def test_the_model_keeps_its_recipe_unless_told_otherwise():
    pipe = tiny_pipeline(local_attn_size=9, sink_size=3)
    set_recipe(pipe, config())
    assert recipe(pipe) == (9, 3, [1.0, 0.75, 0.5, 0.25], None)
    set_recipe(pipe, config(local_attn_size=6, sink_size=0, sigmas="1,0.5"))
    assert recipe(pipe) == (6, 0, [1.0, 0.5], None)


def test_sigmas_are_those_of_every_block():
    """As of the pipeline's call: the first block has no others."""
    pipe = tiny_pipeline(sigmas=[1.0], first_block_sigmas=[1.0, 0.75, 0.5, 0.25])
    set_recipe(pipe, config(sigmas=[1.0, 0.5]))
    assert torch.equal(video(pipe), video(tiny_pipeline(sigmas=[1.0, 0.5])))


def test_a_server_s_recipe_is_trained_in_the_plain_loop():
    """And then generates what the plain pipeline does."""
    pipe = tiny_pipeline(num_context_frames=3, sigmas=[1.0, 0.5, 0.0])
    before = video(pipe)
    with pytest.raises(UserError, match="set num_context_frames=0"):
        set_recipe(pipe, config())
    set_recipe(pipe, config(num_context_frames=0, sigmas=[1.0, 0.75, 0.5, 0.25]))
    assert recipe(pipe) == recipe(tiny_pipeline())
    assert torch.equal(video(pipe), video(tiny_pipeline())) and not torch.equal(video(pipe), before)


def test_gradients_are_divided_by_the_samples_alone(tmp_path, monkeypatch):
    """Not by what the environment says of accumulation as well."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert make_accelerator(config(output_dir=str(tmp_path))).gradient_accumulation_steps == 1


def test_a_window_needs_room():
    with pytest.raises(UserError, match="`local_attn_size` must be -1 or at least .* = 6, but is 3"):
        set_recipe(tiny_pipeline(), config(local_attn_size=3, sink_size=3))
    pipe = tiny_pipeline(local_attn_size=9, sink_size=3, rope_mode="relative", rope_window=14)
    set_recipe(pipe, config(local_attn_size=12))
    with pytest.raises(UserError, match="`rope_window` must be .* at least `local_attn_size` = 15"):
        set_recipe(pipe, config(local_attn_size=15))
    with pytest.raises(UserError, match="`memory_bank_size=2` needs a `local_attn_size`"):
        set_recipe(tiny_pipeline(local_attn_size=6, memory_bank_size=2), config(local_attn_size=-1))


def test_a_path_and_splits_are_what_the_setting_says(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder, file = tmp_path / "prompts", tmp_path / "prompts" / "train.txt"
    folder.mkdir()
    file.write_text("a red circle\n\na blue square\na green cross\n")
    (folder / "test.txt").write_text("a red cross\na blue circle\n")
    for prompts in (folder, file):
        expected = load_prompts(config(prompts=str(prompts), num_eval_prompts=1))
        assert [len(split) for split in expected] == ([3, 1] if prompts == folder else [2, 1])
        for given in (prompts, str(prompts)):
            assert load_prompts(config(num_eval_prompts=1), given) == expected
    by_name = config(prompts=str(tmp_path), prompts_data_dir="prompts", num_eval_prompts=1)
    splits = load_dataset(str(tmp_path), data_dir="prompts")
    assert load_prompts(config(num_eval_prompts=1), splits) == load_prompts(by_name)
    # What is held out may be given in another way.
    train, held_out = load_prompts(config(), splits, folder / "test.txt")
    assert (len(train), [prompt.text for prompt in held_out]) == (3, ["a red cross", "a blue circle"])
    with pytest.raises(UserError, match="a red circle is no prompt file, has no train.txt") as error:
        load_prompts(config(), "a red circle")
    assert "\n" not in str(error.value)


def test_the_column_is_that_of_the_settings():
    dataset = Dataset.from_dict({"text": ["x", "y", "z"], "caption": ["a", "b", "c"]})
    train, held_out = load_prompts(config(prompt_column="caption", num_eval_prompts=1), dataset)
    assert train == [Prompt("b", {"text": "y"}), Prompt("c", {"text": "z"})] and held_out[0].text == "a"


def test_scenes_that_nobody_makes_are_told_once(caplog):
    scenes, plain = ["a [1s] | b [1s]", "c | d"], ["e [red] f", "g |"]
    load_prompts(config(), plain, ["h"])
    switched = {"transitions": ["roll"], "switch_prompts": "scenes", "window_size": 3}
    load_prompts(config(**switched), scenes, ["h | i"])
    assert not caplog.records
    pairs = switched | {"switch_prompts": "pairs"}
    for values, *prompts in (({}, scenes, ["h | i"]), ({}, plain, ["c | d"]), (pairs, scenes, ["h"])):
        load_prompts(config(**values), *prompts)
        assert len(caplog.messages) == 1 and "--switch_prompts scenes" in caplog.text
        caplog.clear()
    # Without transitions there are no switches of any kind.
    load_prompts(config(switch_prompts="scenes"), scenes, ["h"])
    assert "'a [1s] | b [1s]' are one text here" in caplog.text


@pytest.fixture
def launched(monkeypatch):
    """Makes an Accelerator as under a launcher that sets this variable."""

    def make(name, value):
        monkeypatch.setenv(name, value)
        AcceleratorState._reset_state(reset_partial_state=True)
        with accelerate_settings():
            check_precision(Accelerator())

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)
    assert not PartialState._shared_state


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ACCELERATE_MIXED_PRECISION", "rubbish", "must be one of no, bf16, not rubbish"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "must be one of no, bf16, not fp16"),
        ("ACCELERATE_USE_CPU", "maybe", "invalid truth value maybe"),
    ],
)
def test_what_a_launcher_got_wrong(launched, name, value, words):
    with pytest.raises(UserError, match=words) as error:
        launched(name, value)
    assert "\n" not in str(error.value)


def stock_folder(folder):
    """A Wan pipeline of diffusers' own classes, as on the Hub."""
    pipe = tiny_pipeline()
    transformer = WanTransformer3DModel(**{k: v for k, v in pipe.transformer.config.items() if k not in MODEL_ONLY})
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    WanPipeline(pipe.tokenizer, pipe.text_encoder, pipe.vae, scheduler, transformer).save_pretrained(folder)


@pytest.mark.parametrize("load", [load_from, lambda model: load_frozen_pipeline(model, Accelerator(cpu=True))])
def test_a_stock_wan_folder_is_no_causal_one(load, tmp_path):
    """Said from its index alone, before anything is loaded or downloaded."""
    stock_folder(tmp_path)
    shutil.rmtree(tmp_path / "transformer")
    with pytest.raises(UserError, match="is a WanPipeline, not a CausalWanPipeline: `astrolabe convert`"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "name", "value", "words"),
    [
        ("transformer/config.json", "num_layers", "four", "`num_layers` must be a whole number of at least 1"),
        ("transformer/config.json", "num_frames_per_block", 0, "`num_frames_per_block` must be a whole number"),
        ("transformer/config.json", "sink_size", -1, "`sink_size` must be a whole number of at least 0"),
        ("transformer/config.json", "ffn_dim", "x", "str"),
        ("transformer/config.json", "patch_size", 3, "int"),
        ("vae/config.json", "z_dim", None, "NoneType"),
        ("scheduler/scheduler_config.json", "shift", "x", ""),
        ("text_encoder/config.json", "d_model", "x", "d_model"),
        ("model_index.json", "sigmas", [1000, 500], "divide them by 1000"),
        ("model_index.json", "vae", [None, None], "loaded without vae"),
        ("model_index.json", "text_encoder", [None, None], "loaded without text_encoder"),
        ("model_index.json", "_class_name", 5, ""),
    ],
)
def test_values_in_a_config_that_cannot_be(model_folder, tmp_path, file, name, value, words):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | {name: value}))
    with pytest.raises(UserError, match=f"cannot load {folder}: .*{words}") as error:
        load_from(str(folder))
    assert "\n" not in str(error.value)


def test_video_size_is_whole_blocks():
    pipe = tiny_pipeline(num_frames=21)
    assert video_size(pipe, None, 32, 240) == {"height": 32, "width": 32, "num_frames": 237}
    assert video_size(pipe, None, None, None) == {"height": 32, "width": 48, "num_frames": 21}
    with pytest.raises(UserError, match="video size: `num_frames` must be a whole number of at least 9, not 5"):
        video_size(pipe, None, None, 5)


def test_loading_is_silent(model_folder, capfd):
    pipe = load_frozen_pipeline(str(model_folder), Accelerator(cpu=True))
    assert pipe.transformer.config.num_layers == 1 and capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("file", "tensor"),
    [
        ("transformer/diffusion_pytorch_model", "blocks.1.attn1.to_q.weight"),
        ("vae/diffusion_pytorch_model", "decoder.conv_in.weight"),
        ("text_encoder/model", "encoder.block.0.layer.0.SelfAttention.q.weight"),
    ],
)
def test_a_folder_that_lacks_a_tensor(file, tensor, tmp_path, capfd):
    """diffusers and transformers would go on with random values, or none."""
    path = save_tiny_pipeline(tmp_path / "tiny") / f"{file}.safetensors"
    tensors = load_file(path)
    del tensors[tensor]
    save_file(tensors, path, metadata={"format": "pt"})
    capfd.readouterr()
    with pytest.raises(UserError, match=f"cannot load .*{tensor}") as error:
        load_from(str(tmp_path / "tiny"))
    assert "\n" not in str(error.value) and "initialized" not in capfd.readouterr().err
