"""Whole folders and LoRA files, converted by the command that users run."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline, WanTransformer3DModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from astrolabe_diffusers.loaders.conversion import save_shards
from astrolabe_diffusers.loaders.published_models import PUBLISHED_MODELS
from tests.loaders.original_layout import original_names, original_weights
from tests.tiny_pipeline import tiny_pipeline


@pytest.fixture
def convert(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    import convert_checkpoint

    yield lambda *args: convert_checkpoint.main([str(arg) for arg in args])
    sys.modules.pop("convert_checkpoint")


@pytest.fixture(scope="module")
def pipe():
    # 512 text tokens, which is what conversion writes.
    return tiny_pipeline(max_sequence_length=512)


@pytest.fixture(scope="module")
def base(pipe, tmp_path_factory):
    """A stock Wan2.1 folder as it lies on the Hub, with other weights in its transformer."""
    folder = tmp_path_factory.mktemp("base")
    names = ("patch_size", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim")
    names += ("freq_dim", "ffn_dim", "num_layers", "rope_max_seq_len")
    stock = WanTransformer3DModel(**{name: pipe.transformer.config[name] for name in names})
    WanPipeline(pipe.tokenizer, pipe.text_encoder, pipe.vae, pipe.scheduler, stock).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(pipe, tmp_path_factory):
    """All entries, so that every model finds its own; only the authors' first choice has the right weights."""
    path = tmp_path_factory.mktemp("checkpoint") / "model.pt"
    weights = {f"model.{name}": tensor for name, tensor in original_weights(pipe.transformer).items()}
    torch.save({"generator": weights, "generator_ema": weights}, path)
    return path


def video(pipe, **kwargs):
    kwargs = dict(height=32, width=48, num_frames=21, output_type="pt") | kwargs
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red circle moves up", generator=torch.Generator().manual_seed(0), **kwargs).frames


FOUR = [1000.0, 937.5, 833.333, 625.0]
# Frames in a block, sink, window, and the timesteps after the first block, which takes four steps everywhere.
RECIPES = {
    "self-forcing": (3, 0, -1, FOUR),
    "causal-forcing-chunkwise": (3, 0, -1, FOUR),
    "causal-forcing-framewise": (1, 0, -1, FOUR),
    "causal-forcing-framewise-2step": (1, 0, -1, [1000.0, 833.333]),
    "causal-forcing-framewise-1step": (1, 0, -1, [1000.0]),
    "longlive": (3, 3, 12, FOUR),
}


@pytest.mark.parametrize("model", RECIPES)
def test_converted_folder_generates_by_the_model_s_recipe(model, convert, base, checkpoint, pipe, tmp_path):
    convert("--model", model, "--checkpoint", checkpoint, "--base", base, "--output_dir", tmp_path)
    converted = DiffusionPipeline.from_pretrained(tmp_path)
    *block_sink_window, timesteps = RECIPES[model]
    config = converted.transformer.config
    assert [config.num_frames_per_block, config.sink_size, config.local_attn_size] == block_sink_window
    assert converted.config.max_sequence_length == 512 and converted.scheduler.config.shift == 5.0
    weights = converted.transformer.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in pipe.transformer.state_dict().items())

    taken = {}

    def count(pipe, step, timestep, kwargs):
        taken.setdefault(pipe.current_block, []).append(round(timestep.item(), 3))
        return {}

    result = video(converted, num_frames=1 + 4 * (3 * 2 - 1), callback_on_step_end=count)
    assert taken.pop(0) == FOUR
    assert len(taken) == 6 // config.num_frames_per_block - 1
    assert all(levels == timesteps for levels in taken.values())
    if config.num_frames_per_block == 3:
        assert (result - video(pipe)).abs().max() < 1e-5


def test_every_published_model_has_been_tried():
    assert PUBLISHED_MODELS.keys() - RECIPES.keys() == {"krea-14b"}


def test_flat_safetensors_and_dtype(convert, base, pipe, tmp_path):
    weights = {f"model.{name}": tensor for name, tensor in original_weights(pipe.transformer).items()}
    save_file(weights, tmp_path / "krea.safetensors")
    out = tmp_path / "out"
    convert(
        *("--model", "krea-14b", "--checkpoint", tmp_path / "krea.safetensors", "--base", base),
        *("--output_dir", out, "--dtype", "bfloat16"),
    )
    saved = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    expected = pipe.transformer.state_dict()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name].bfloat16()) for name, tensor in saved.items())


def test_shards(pipe, tmp_path):
    """As diffusers reads them: no file above the limit, every tensor in one of them."""
    weights = pipe.transformer.state_dict()
    limit = sum(tensor.nbytes for tensor in weights.values()) // 3
    pipe.transformer.save_config(tmp_path)
    save_shards(iter(weights.items()), tmp_path, limit)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) in (3, 4, 5)
    assert all(sum(tensor.nbytes for tensor in load_file(file).values()) <= limit for file in files)
    loaded = type(pipe.transformer).from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.items())
    # A second conversion into the folder leaves nothing of the first.
    save_shards(iter(weights.items()), tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["diffusion_pytorch_model.safetensors"]


def original_lora(pipe, rank: int, prefix: str) -> dict[str, torch.Tensor]:
    """On every linear layer of the blocks, as LongLive's; both matrices are random."""
    generator, lora = torch.Generator().manual_seed(1), {}
    for original, name in original_names(pipe.transformer.config.num_layers).items():
        weight = pipe.transformer.state_dict()[name]
        if original.startswith("blocks.") and original.endswith(".weight") and weight.ndim == 2:
            module = prefix + original.removesuffix(".weight")
            lora[f"{module}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=generator) * 0.3
            lora[f"{module}.lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=generator) * 0.3
    return lora


def merged(pipe, lora, prefix, scale):
    """A second pipeline with W + scale B A, written out."""
    result = tiny_pipeline(max_sequence_length=512)
    weights = result.transformer.state_dict()
    for original, name in original_names(pipe.transformer.config.num_layers).items():
        module = prefix + original.removesuffix(".weight")
        if f"{module}.lora_A.weight" in lora:
            weights[name] += scale * lora[f"{module}.lora_B.weight"] @ lora[f"{module}.lora_A.weight"]
    return result


def write_lora(folder: Path, layout: str, lora: dict) -> Path:
    folder.mkdir()
    if layout == "LongLive, nested":
        torch.save({"generator_lora": lora, "critic_lora": {}, "step": 3}, folder / "lora.pt")
        return folder / "lora.pt"
    if layout == "LongLive, flat":
        torch.save(lora, folder / "lora.pt")
        return folder / "lora.pt"
    torch.save(lora, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    return folder


LORAS = {
    "LongLive, nested": ("base_model.model.", 1.0),
    "LongLive, flat": ("base_model.model._fsdp_wrapped_module.", 1.0),
    "Astrolabe": ("base_model.model.model.", 2.0),
}


@pytest.mark.parametrize("layout", LORAS)
def test_lora(layout, convert, pipe, base, checkpoint, tmp_path):
    """Loaded, it changes the model as B A says; merged, it is the same; trained on, it has its rank and alpha."""
    prefix, scale = LORAS[layout]
    lora = original_lora(pipe, 4, prefix)
    expected = video(merged(pipe, lora, prefix, scale))
    assert (expected - video(pipe)).abs().max() > 0.01
    path = write_lora(tmp_path / "original", layout, lora)

    convert("--lora", path, "--output_dir", tmp_path / "lora")
    loaded = tiny_pipeline(max_sequence_length=512)
    loaded.load_lora_weights(tmp_path / "lora", adapter_name="default")
    assert (video(loaded) - expected).abs().max() < 1e-4
    config = loaded.transformer.peft_config["default"]
    assert isinstance(config, LoraConfig) and (config.r, config.lora_alpha) == (4, 4 * scale)

    convert(
        *("--model", "longlive", "--checkpoint", checkpoint, "--base", base, "--lora", path),
        *("--output_dir", tmp_path / "merged"),
    )
    assert (video(DiffusionPipeline.from_pretrained(tmp_path / "merged")) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda lora: lora.update({"step": torch.zeros(1)}), "is no LoRA of linear layers: it holds step"),
        (lambda lora: lora.pop(next(iter(lora))), "blocks.0.ffn.net.0.proj has A or B only"),
        (lambda lora: lora.clear(), "is no LoRA: empty"),
        (lambda lora: lora.update({next(iter(lora)): torch.zeros(5, 24)}), "different ranks: 4, 5"),
    ],
)
def test_lora_files_that_are_none(change, message, convert, pipe, tmp_path):
    lora = original_lora(pipe, 4, "")
    change(lora)
    torch.save(lora, tmp_path / "lora.pt")
    with pytest.raises(SystemExit, match=message):
        convert("--lora", tmp_path / "lora.pt", "--output_dir", tmp_path / "out")


def test_what_a_user_gets_wrong(convert, base, checkpoint, pipe, tmp_path, capsys):
    def fails(message, *args):
        with pytest.raises(SystemExit) as error:
            convert(*args, "--output_dir", tmp_path / "out")
        assert message in str(error.value) + capsys.readouterr().err

    model = ("--model", "self-forcing", "--checkpoint", checkpoint)
    fails("nothing to convert")
    fails("needs --model and --base", "--checkpoint", checkpoint)
    fails("invalid choice: 'wan'", "--model", "wan", "--checkpoint", checkpoint)
    fails("no such file", "--model", "self-forcing", "--checkpoint", tmp_path / "nothing.pt", "--base", base)

    # The base has three layers, the checkpoint two.
    larger = tmp_path / "larger"
    shutil.copytree(base, larger)
    config = json.loads((larger / "transformer" / "config.json").read_text()) | {"num_layers": 3}
    (larger / "transformer" / "config.json").write_text(json.dumps(config))
    fails("27 missing (blocks.2.scale_shift_table, ", *model, "--base", larger)

    (tmp_path / "empty").mkdir()
    fails("it has no tokenizer, text_encoder, vae, transformer", *model, "--base", tmp_path / "empty")

    other = original_lora(tiny_pipeline(num_layers=3), 4, "")
    torch.save(other, tmp_path / "lora.pt")
    fails("this LoRA changes blocks.2.ffn.net.0.proj", *model, "--base", base, "--lora", tmp_path / "lora.pt")
    assert not (tmp_path / "out").exists()
