"""Folders and LoRA files: saved and loaded."""

import json
import re
import shutil

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from astrolabe_diffusers import TINY_SHAPES, CausalWanPipeline, CausalWanTransformer3DModel
from astrolabe_diffusers.cli.main import main as astrolabe
from astrolabe_diffusers.distributed.sharding import whole_weight
from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.pipelines.loading import find_lora, load_from, load_loras, weights_digest
from astrolabe_diffusers.training.adapter_files import save_adapter
from astrolabe_diffusers.training.policies import load_policies
from tests.models.test_transformer_causal_wan import MODEL_ONLY
from tests.own_transformer import OwnTransformer
from tests.tiny_pipeline import SMALL, model_index, save_tiny_pipeline, tiny_pipeline, tiny_shapes_captions
from tests.training.helpers import policy_pipeline
from tests.training.test_checkpoints import plant


PROMPTS = ["a red circle moves left on a black background", "a green cross moves up on a white background"]
OVERRIDES = dict(local_attn_size=5, sink_size=1, rope_mode="relative", num_frames=21, sigmas=(1.0, 0.6, 0.2))
OVERRIDES |= SMALL
RANK, ALPHA = 4, 10
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]


def generate(pipe, output_type="pt", **kwargs):
    generator = torch.Generator().manual_seed(0)
    return pipe(PROMPTS, generator=generator, output_type=output_type, **kwargs).frames


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("pipeline"), **OVERRIDES)


def save_lora(path):
    """LoRA weights (alpha != rank) into a folder; the frames that they give."""
    pipe = tiny_pipeline(**OVERRIDES)
    torch.manual_seed(7)
    pipe.transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=False))
    CausalWanPipeline.save_lora_weights(
        path,
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
        **_collate_lora_metadata({"transformer": pipe.transformer}),
    )
    return generate(pipe)


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """The folder and the frames of a LoRA."""
    path = tmp_path_factory.mktemp("lora")
    return path, save_lora(path)


@pytest.fixture
def pipe(folder):
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_model_index_is_safe_for_the_hub(folder):
    """The Hub's check accepts no library that it does not know."""
    index = model_index(folder)
    assert index["_class_name"] == "CausalWanPipeline"
    components = {name: entry for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
    assert components["transformer"] == ["diffusers", "CausalWanTransformer3DModel"]
    # Of a component that is not there diffusers' own pipelines say `null` as well.
    assert components.pop("tiny_decoder") == components.pop("memory_transformer") == [None, None]
    assert {library for library, _ in components.values()} == {"diffusers", "transformers"}
    assert index["sigmas"] == [1.0, 0.6, 0.2]
    assert (index["num_frames"], index["height"], index["width"]) == (21, 16, 32)
    assert (index["max_sequence_length"], index["frame_rate"]) == (16, 16)
    assert str(folder) not in json.dumps(index)


def test_round_trip(folder, pipe, tmp_path):
    assert type(pipe) is CausalWanPipeline and type(pipe.transformer) is CausalWanTransformer3DModel
    assert pipe.config.sigmas == [1.0, 0.6, 0.2]
    expected = generate(tiny_pipeline(**OVERRIDES))
    assert torch.equal(generate(pipe), expected)
    pipe.save_pretrained(tmp_path)
    origin = {"_name_or_path"}
    assert {k: v for k, v in model_index(tmp_path).items() if k not in origin} == model_index(folder)
    again = CausalWanPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(generate(again), expected)


def test_components_can_be_replaced(folder):
    """The usual keywords of `from_pretrained`: another component, and a dtype."""
    vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae")
    transformer = CausalWanTransformer3DModel.from_pretrained(folder, subfolder="transformer", local_attn_size=-1)
    pipe = DiffusionPipeline.from_pretrained(folder, vae=vae, transformer=transformer, dtype=torch.bfloat16)
    assert pipe.vae is vae and pipe.transformer is transformer
    assert pipe.text_encoder.dtype == torch.bfloat16
    half = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert half.transformer.blocks[0].ffn.net[2].weight.dtype == torch.bfloat16
    assert half.transformer.scale_shift_table.dtype == torch.float32
    assert generate(half).isfinite().all()


def test_stock_transformer_in_a_pipeline(folder, tmp_path):
    """A transformer folder that diffusers' own class wrote serves as a causal one."""
    pipe = tiny_pipeline(**OVERRIDES)
    config = {k: v for k, v in pipe.transformer.config.items() if k not in MODEL_ONLY and not k.startswith("_")}
    stock = WanTransformer3DModel(**config)
    stock.load_state_dict(pipe.transformer.state_dict())
    stock.save_pretrained(tmp_path)
    transformer = CausalWanTransformer3DModel.from_pretrained(
        tmp_path, sink_size=1, local_attn_size=5, rope_mode="relative"
    )
    loaded = DiffusionPipeline.from_pretrained(folder, transformer=transformer)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(generate(loaded, "latent"), generate(pipe, "latent"))


def test_a_stock_pipeline_is_refused(folder, tmp_path):
    """It would load with a warning, and make noise. With causal parts it becomes one."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    transformer = WanTransformer3DModel(**{k: v for k, v in pipe.transformer.config.items() if k not in MODEL_ONLY})
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    stock = WanPipeline(pipe.tokenizer, pipe.text_encoder, pipe.vae, scheduler, transformer)
    stock.save_pretrained(tmp_path)
    for make in (lambda: CausalWanPipeline.from_pretrained(tmp_path), lambda: CausalWanPipeline.from_pipe(stock)):
        with pytest.raises(ValueError, match="the transformer is a WanTransformer3DModel.*astrolabe convert") as error:
            make()
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"a UniPC.*`scheduler=FlowMatchLCMScheduler\(shift=5.0\)`"):
        CausalWanPipeline.from_pipe(stock, transformer=pipe.transformer)
    causal = CausalWanPipeline.from_pipe(
        stock, transformer=pipe.transformer, scheduler=pipe.scheduler, sigmas=[1.0, 0.6, 0.2]
    )
    size = dict(height=16, width=32, num_frames=21, max_sequence_length=16)
    assert torch.equal(generate(causal, **size), generate(pipe))
    assert torch.equal(generate(CausalWanPipeline.from_pipe(pipe), "latent"), generate(pipe, "latent"))


@pytest.mark.parametrize("scheduler", [UniPCMultistepScheduler, FlowMatchEulerDiscreteScheduler])
def test_another_scheduler(scheduler):
    pipe = tiny_pipeline()
    pipe.scheduler = scheduler()
    for method in (pipe, pipe.stream):
        with pytest.raises(ValueError, match=f"the scheduler is a {scheduler.__name__}"):
            method(PROMPTS)


# Parts of a pipeline: texts are encoded here, videos are made there


def test_encode_prompts_alone(folder, pipe, tmp_path):
    encoder = CausalWanPipeline.from_pretrained(folder, transformer=None, vae=None)
    embeds = encoder.encode_prompt(PROMPTS)
    assert torch.equal(embeds, pipe.encode_prompt(PROMPTS))
    for arguments in ({"prompt": PROMPTS}, {"prompt_embeds": embeds}):
        with pytest.raises(ValueError, match="loaded without vae and transformer"):
            encoder(**arguments)
    encoder.save_pretrained(tmp_path)
    assert not (tmp_path / "transformer").exists() and not (tmp_path / "vae").exists()
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert again.transformer is None and torch.equal(again.encode_prompt(PROMPTS), embeds)
    half = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.encode_prompt(PROMPTS).dtype == torch.bfloat16


def test_generate_from_embeddings_alone(folder, pipe, tmp_path):
    def video(pipe, **kwargs):
        return pipe(generator=torch.Generator().manual_seed(0), output_type="pt", **kwargs).frames

    generator = DiffusionPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None)
    generator.save_pretrained(tmp_path)
    embeds, expected = pipe.encode_prompt(PROMPTS), generate(pipe)
    for part in (generator, DiffusionPipeline.from_pretrained(tmp_path)):
        part.set_progress_bar_config(disable=True)
        assert torch.equal(video(part, prompt_embeds=embeds), expected)
        with pytest.raises(ValueError, match="loaded without tokenizer and text_encoder.*`prompt_embeds`"):
            part(PROMPTS)


def test_prompt_folder(folder):
    train = (folder / "prompts" / "train.txt").read_text().splitlines()
    test = (folder / "prompts" / "test.txt").read_text().splitlines()
    assert len(train) == 8 and len(test) == 4 and not set(train) & set(test)
    assert set(train + test) <= set(tiny_shapes_captions())


# LoRA


def test_lora_file(lora):
    path, _ = lora
    with safe_open(path / "pytorch_lora_weights.safetensors", framework="pt") as file:
        keys = list(file.keys())
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    # Two layers, twelve linear modules in each, two matrices.
    assert len(keys) == 2 * (4 + 4 + 2) * 2
    assert all(key.startswith("transformer.blocks.") for key in keys)
    assert metadata["transformer.r"] == RANK and metadata["transformer.lora_alpha"] == ALPHA


def test_lora_load_fuse_unload(pipe, lora):
    path, expected = lora
    base = generate(pipe)
    assert (expected - base).abs().max() > 1e-2

    pipe.load_lora_weights(path, adapter_name="style")
    config = pipe.transformer.peft_config["style"]
    assert (config.r, config.lora_alpha) == (RANK, ALPHA)
    scaling = pipe.transformer.blocks[0].attn1.to_q.scaling["style"]
    assert scaling == ALPHA / RANK
    assert (generate(pipe) - expected).abs().max() <= 1e-5
    assert torch.equal(generate(pipe, attention_kwargs={"scale": 0.0}), base)
    half = generate(pipe, attention_kwargs={"scale": 0.5})
    pipe.set_adapters("style", 0.5)
    assert (generate(pipe) - half).abs().max() <= 1e-5 and (half - base).abs().max() > 1e-3
    pipe.set_adapters("style", 1.0)

    pipe.fuse_lora()
    assert (generate(pipe) - expected).abs().max() <= 1e-4
    pipe.unfuse_lora()
    assert (generate(pipe) - expected).abs().max() <= 1e-4
    pipe.unload_lora_weights()
    assert not any("lora" in name for name, _ in pipe.transformer.named_parameters())
    assert (generate(pipe) - base).abs().max() <= 1e-4


def test_dropout_of_a_lora_does_not_work_in_generation(pipe, tmp_path):
    trained = tiny_pipeline(**OVERRIDES).transformer
    trained.add_adapter(LoraConfig(r=RANK, lora_dropout=0.5, target_modules=TARGETS, init_lora_weights=False))
    CausalWanPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(trained),
        **_collate_lora_metadata({"transformer": trained}),
    )
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    assert pipe.transformer.peft_config["style"].lora_dropout == 0.5
    assert torch.equal(generate(pipe, "latent"), generate(pipe, "latent"))
    pipe.transformer.train()
    assert not torch.equal(generate(pipe, "latent"), generate(pipe, "latent"))


def test_lora_survives_fusing_and_saving(pipe, lora, tmp_path):
    """A fused pipeline is an ordinary folder."""
    path, expected = lora
    pipe.load_lora_weights(path)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path)
    fused = DiffusionPipeline.from_pretrained(tmp_path)
    fused.set_progress_bar_config(disable=True)
    assert (generate(fused) - expected).abs().max() <= 1e-4


def test_adapter_of_another_model(lora):
    """One line instead of a page of size mismatches, and nothing of the adapter stays behind."""
    path, _ = lora
    wider = tiny_pipeline(num_attention_heads=3)
    with pytest.raises(ValueError) as error:
        wider.load_lora_weights(path)
    assert "\n" not in str(error.value)
    assert not any("lora" in name for name, _ in wider.transformer.named_parameters())


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


def test_a_lora_of_an_earlier_embedded_model_is_refused(tmp_path, capsys):
    """That one had six layers of width 128."""
    tensors = {}
    for module in (f"blocks.{i}.attn1.{name}" for i in range(6) for name in ("to_q", "to_k", "to_v", "to_out.0")):
        tensors[f"transformer.{module}.lora_A.weight"] = torch.ones(8, 128)
        tensors[f"transformer.{module}.lora_B.weight"] = torch.ones(128, 8)
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    words = r"another model's: at blocks.0.attn1.to_k it is 128 x 128, in .* width 256, 4 layers that is 256 x 256\.$"
    with pytest.raises(ValueError, match=words):
        DiffusionPipeline.from_pretrained(TINY_SHAPES).load_lora_weights(tmp_path)
    command = ["generate", "--prompt", PROMPTS[0], "--lora", str(tmp_path), "--output_dir", str(tmp_path / "videos")]
    capsys.readouterr()
    assert astrolabe(command) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot load the LoRA {tmp_path}: ") and error.count("\n") == 1
    assert re.search(words, error)


def test_another_pipeline_is_refused(tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        8, block_out_channels=(4,), norm_num_groups=2, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a DDPMPipeline, not a CausalWanPipeline"):
        load_from(str(tmp_path), dtype=torch.float32)


def test_from_pipe_keeps_what_the_pipeline_has(folder):
    pipe = CausalWanPipeline.from_pretrained(folder, dtype=torch.bfloat16, sigmas=[1.0, 0.5])
    before = {name: p.dtype for name, p in pipe.transformer.named_parameters()}
    other = CausalWanPipeline.from_pipe(pipe, first_block_sigmas=[1.0, 0.9, 0.5])
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.bfloat16, torch.float32}
    assert {name: p.dtype for name, p in other.transformer.named_parameters()} == before
    assert other.transformer is pipe.transformer and other.config.sigmas == [1.0, 0.5]
    assert other.config.first_block_sigmas == [1.0, 0.9, 0.5] and pipe.config.first_block_sigmas is None
    cast = CausalWanPipeline.from_pipe(pipe, dtype=torch.float32)
    assert {p.dtype for p in cast.vae.parameters()} == {torch.float32}


def test_a_class_that_nothing_has_registered(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "own")
    index = tmp_path / "own" / "model_index.json"
    index.write_text(index.read_text().replace("CausalWanTransformer3DModel", "NobodysTransformer"))
    with pytest.raises(UserError, match="has a NobodysTransformer, which nothing has registered.*--import_modules"):
        load_from(str(tmp_path / "own"), dtype=torch.float32)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_lora_whose_name_can_only_be_a_path(pipe, name):
    with pytest.raises(FileNotFoundError, match=f"there is no file or folder {name}."):
        pipe.load_lora_weights(name)


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


# What `save_pretrained` of the transformer is told; the files of an index have two or three tensors each.
SAVED_AS = {
    "one file": {},
    "an index": {"max_shard_size": "20KB"},
    "one file of a variant": {"variant": "ema"},
    "an index of a variant": {"variant": "ema", "max_shard_size": "20KB"},
    "a torch file": {"safe_serialization": False},
}


@pytest.mark.parametrize("saved_as", SAVED_AS)
def test_weights_left_in_files_are_those_that_diffusers_loads(saved_as, folder, tmp_path):
    options = SAVED_AS[saved_as]
    model = shutil.copytree(folder, tmp_path / "model")
    other = tiny_pipeline(seed=1, **OVERRIDES).transformer
    if "variant" not in options:
        shutil.rmtree(model / "transformer")
    other.save_pretrained(model / "transformer", **options)
    kwargs = {"variant": options.get("variant"), "dtype": torch.bfloat16}
    expected = DiffusionPipeline.from_pretrained(model, **kwargs).transformer
    mapped = load_from(str(model), map_for=torch.bfloat16, **kwargs).transformer
    assert type(mapped) is CausalWanTransformer3DModel
    assert {**mapped.config, "_name_or_path": None} == {**expected.config, "_name_or_path": None}
    found = dict(mapped.named_parameters())
    assert found.keys() == dict(expected.named_parameters()).keys()
    for name, weight in expected.named_parameters():
        assert found[name].dtype == weight.dtype and found[name].isnan().all()
        assert torch.equal(whole_weight(found[name]).to(weight.dtype), weight)
    weight = "blocks.0.attn1.to_q.weight"
    assert torch.equal(whole_weight(found[weight]), other.get_parameter(weight))


def test_weights_of_a_transformer_of_ones_own(tmp_path):
    own = OwnTransformer()
    CausalWanPipeline(**{**tiny_pipeline(**OVERRIDES).components, "transformer": own}).save_pretrained(tmp_path)
    mapped = load_from(str(tmp_path), map_for=torch.bfloat16).transformer
    assert type(mapped) is OwnTransformer
    assert all(torch.equal(whole_weight(p), own.get_parameter(name)) for name, p in mapped.named_parameters())


def test_a_variant_that_only_another_model_has(folder, tmp_path):
    """As diffusers has it, the transformer is then the one without."""
    model = shutil.copytree(folder, tmp_path / "model")
    file = "diffusion_pytorch_model"
    (model / "vae" / f"{file}.safetensors").rename(model / "vae" / f"{file}.ema.safetensors")
    options = {"variant": "ema", "map_for": torch.float32, "dtype": torch.float32}
    mapped = load_from(str(model), **options).transformer
    expected = tiny_pipeline(**OVERRIDES).transformer
    assert all(torch.equal(whole_weight(p), expected.get_parameter(n)) for n, p in mapped.named_parameters())
    (model / "vae" / f"{file}.ema.safetensors").rename(model / "vae" / f"{file}.safetensors")
    with pytest.raises(UserError, match="`variant=ema`, but no such"):
        load_from(str(model), **options)


def test_weights_left_in_files_of_the_hub(folder, tmp_path, monkeypatch):
    """In its cache, of a revision that is not the newest; without the network."""
    repo = tmp_path / "models--me--tiny"
    revisions = {"old": "1" * 40, "main": "0" * 40}
    (repo / "refs").mkdir(parents=True)
    for revision, commit in revisions.items():
        (repo / "refs" / revision).write_text(commit)
        snapshot = shutil.copytree(folder, repo / "snapshots" / commit)
        tiny_pipeline(seed=len(revision), **OVERRIDES).transformer.save_pretrained(snapshot / "transformer")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for revision in revisions:
        mapped = load_from("me/tiny", revision, map_for=torch.float32, dtype=torch.float32).transformer
        expected = tiny_pipeline(seed=len(revision), **OVERRIDES).transformer
        assert all(torch.equal(whole_weight(p), expected.get_parameter(n)) for n, p in mapped.named_parameters())


def test_files_that_do_not_fit_are_told_before_any_shard_is_read(folder, tmp_path):
    model = shutil.copytree(folder, tmp_path / "model") / "transformer"
    path = model / "diffusion_pytorch_model.safetensors"
    whole = load_file(path)
    name = "blocks.1.attn1.to_q.weight"

    def refused(words):
        with pytest.raises(UserError, match=rf"^cannot load {model.parent}: .*{words}") as error:
            load_from(str(model.parent), map_for=torch.float32, dtype=torch.float32)
        assert "\n" not in str(error.value)

    save_file({key: value for key, value in whole.items() if key != name}, path)
    refused(rf"1 missing \({name}\)")
    save_file(whole | {name: whole[name][:-1].clone()}, path)
    refused(rf"1 of another shape \({name} ")
    path.write_bytes(path.read_bytes()[:-4])
    refused("no readable checkpoint")
    path.unlink()
    refused("there is no diffusion_pytorch_model.safetensors")
    save_file(whole | {"norm_added_q.weight": torch.ones(1)}, path)
    assert load_from(str(model.parent), map_for=torch.float32, dtype=torch.float32)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "torchao"}}))
    with pytest.raises(UserError, match="the transformer is quantised"):
        load_from(str(model.parent), map_for=torch.float32, dtype=torch.float32)


def test_a_lora_to_start_from_fits_weights_left_in_files(folder, tmp_path):
    save_lora(tmp_path)
    adapters = []
    for map_for in (torch.bfloat16, None):
        pipe = load_from(str(folder), map_for=map_for, dtype=torch.bfloat16)
        load_policies(pipe, tmp_path, ["old", "reference"])
        named = pipe.transformer.named_parameters()
        adapters.append({name: (value, value.requires_grad) for name, value in named if ".lora_" in name})
    left, loaded = adapters
    assert left.keys() == loaded.keys() and {name.split(".")[-2] for name in left} == {"default", "old", "reference"}
    for name, (value, requires_grad) in loaded.items():
        assert torch.equal(left[name][0], value) and left[name][1] == requires_grad
