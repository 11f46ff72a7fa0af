"""Whole folders and LoRA files, converted by the command that users run."""

import errno
import json
import os
import shutil
import stat
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline, WanTransformer3DModel
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from astrolabe_diffusers import CausalWanPipeline
from astrolabe_diffusers.cli.convert import main
from astrolabe_diffusers.conversion.convert import save_shards
from astrolabe_diffusers.layouts.published_models import PUBLISHED_MODELS
from tests.layouts.original_layout import original_names, original_weights, published_checkpoint
from tests.layouts.test_experts import two_experts
from tests.tiny_pipeline import tiny_pipeline, tiny_transformer


@pytest.fixture
def convert():
    def run(*args, exit_code=0):
        assert main([str(arg) for arg in args]) == exit_code

    return run


# 512 text tokens, which is what conversion writes.
small_pipeline = partial(tiny_pipeline, max_sequence_length=512, vae_num_res_blocks=0)


@pytest.fixture(scope="module")
def pipe():
    return small_pipeline()


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


@pytest.fixture(scope="module")
def flat(checkpoint, tmp_path_factory):
    """The same without entries."""
    path = tmp_path_factory.mktemp("flat") / "model.pt"
    torch.save(torch.load(checkpoint)["generator"], path)
    return path


def video(pipe, **kwargs):
    kwargs = dict(height=16, width=32, num_frames=21, output_type="pt") | kwargs
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red circle moves up", generator=torch.Generator().manual_seed(0), **kwargs).frames


@pytest.fixture(scope="module")
def made(pipe):
    return video(pipe)


FOUR = [1000.0, 937.5, 833.333, 625.0]
# Frames in a block, sink, window, and the timesteps after the first block, which takes four steps everywhere.
RECIPES = {
    "self-forcing": (3, 0, -1, FOUR),
    "causal-forcing-chunkwise": (3, 0, -1, FOUR),
    "causal-forcing-framewise": (1, 0, -1, FOUR),
    "causal-forcing-framewise-2step": (1, 0, -1, [1000.0, 833.333]),
    "causal-forcing-framewise-1step": (1, 0, -1, [1000.0]),
    "longlive": (3, 3, 12, FOUR),
    "longlive-infinity": (3, 3, 12, FOUR),
    "kvpo-longlive": (3, 3, 12, FOUR),
    "raven": (3, 0, -1, [1000.0, 938.0, 833.0, 625.0]),
    "one-forcing": (1, 0, -1, [1000.0]),
    "infinity-rope": (3, 1, 6, FOUR),
    "rmd": (1, 0, 21, FOUR),
    "self-gradient-forcing-framewise": (1, 4, 21, FOUR),
    "self-gradient-forcing-chunkwise": (3, 3, 12, FOUR),
    "sgf-plus-framewise": (1, 4, 21, FOUR),
    "sgf-plus-chunkwise": (3, 3, 12, FOUR),
    "reward-forcing": (3, 3, 9, FOUR),
    "memflow": (3, 3, 12, FOUR),
    "kvpo-memflow": (3, 3, 12, FOUR),
}


@pytest.mark.parametrize("model", RECIPES)
def test_converted_folder_generates_by_the_model_s_recipe(model, convert, base, pipe, made, tmp_path):
    torch.save(published_checkpoint(model, original_weights(pipe.transformer)), tmp_path / "model.pt")
    out = tmp_path / "out"
    convert("--model", model, "--checkpoint", tmp_path / "model.pt", "--base", base, "--output_dir", out)
    converted = DiffusionPipeline.from_pretrained(out)
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

    result = video(converted, callback_on_step_end=count)
    assert taken.pop(0) == (timesteps if model == "raven" else FOUR)
    # Six latent frames.
    assert len(taken) == 6 // config.num_frames_per_block - 1
    assert all(levels == timesteps for levels in taken.values())
    # Neither window nor position shows in two blocks.
    if config.num_frames_per_block == 3 and timesteps == FOUR and not config.memory_bank_size:
        assert (result - made).abs().max() < 1e-5


def test_every_published_model_has_been_tried():
    assert PUBLISHED_MODELS.keys() - RECIPES.keys() == {"krea-14b"}


@pytest.mark.parametrize("recipe", ["sgf-plus-framewise", "sgf-plus-chunkwise"])
def test_two_experts(recipe, convert, base, pipe, tmp_path):
    second = tiny_transformer(seed=1)
    weights = {f"model.{name}": tensor for name, tensor in two_experts(pipe.transformer, second).items()}
    torch.save({"generator_ema": weights, "generator": {}}, tmp_path / "model.pt")
    out = tmp_path / "out"
    command = ("--recipe", recipe, "--checkpoint", tmp_path / "model.pt", "--base", base, "--output_dir", out)
    convert(*command)
    converted = DiffusionPipeline.from_pretrained(out)
    for expert, expected in ((converted.transformer, pipe.transformer), (converted.memory_transformer, second)):
        assert expert.config.rope_mode == "relative"
        state = expert.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in expected.state_dict().items())
    made = video(converted)
    assert (video(CausalWanPipeline.from_pretrained(out, memory_transformer=None)) - made).abs().max() > 1e-2

    # With a LoRA of each, merged into its own; and the LoRA alone.
    loras = {name: diffusers_lora(seed) for seed, name in enumerate(("transformer", "memory_transformer"))}
    CausalWanPipeline.save_lora_weights(tmp_path, **{f"{name}_lora_layers": lora for name, lora in loras.items()})
    lora = ("--lora", tmp_path / "pytorch_lora_weights.safetensors")
    convert(*command[:-1], tmp_path / "merged", *lora)
    convert(*lora, "--output_dir", tmp_path / "lora")
    converted.load_lora_weights(tmp_path / "lora")
    with_loras = video(converted)
    assert (with_loras - made).abs().max() > 1e-2
    assert (video(DiffusionPipeline.from_pretrained(tmp_path / "merged")) - with_loras).abs().max() < 1e-4

    # Over it, a model that has no second expert: nothing is left of it.
    torch.save({"generator_ema": original_weights(pipe.transformer)}, tmp_path / "plain.pt")
    convert(*command[:3], tmp_path / "plain.pt", *command[4:], "--overwrite")
    assert not (out / "memory_transformer").exists()
    assert DiffusionPipeline.from_pretrained(out).memory_transformer is None


def diffusers_lora(seed: int) -> dict[str, torch.Tensor]:
    a, b = torch.randn(2, 4, 24, generator=torch.Generator().manual_seed(seed))
    return {"blocks.0.attn1.to_k.lora_A.weight": a, "blocks.0.attn1.to_k.lora_B.weight": b.T.contiguous()}


def test_two_experts_that_do_not_fit(fails, base, pipe, tmp_path):
    weights = two_experts(pipe.transformer, tiny_transformer(seed=1))
    command = ("--recipe", "sgf-plus-chunkwise", "--checkpoint", tmp_path / "model.pt", "--base", base)
    command += ("--output_dir", tmp_path / "out")
    torch.save(weights | {"blocks.0.memory_extra": torch.zeros(1)}, tmp_path / "model.pt")
    fails("1 unexpected (blocks.0.extra)", *command)
    weights.pop("blocks.1.memory_modulation")
    torch.save(weights, tmp_path / "model.pt")
    fails("1 missing (blocks.1.scale_shift_table)", *command)
    CausalWanPipeline.save_lora_weights(tmp_path, memory_transformer_lora_layers=diffusers_lora(0))
    torch.save(original_weights(pipe.transformer), tmp_path / "model.pt")
    lora = ("--lora", tmp_path / "pytorch_lora_weights.safetensors")
    fails("this LoRA is for memory_transformer, which this checkpoint does not hold", *command, *lora)


def test_flat_safetensors_and_dtype(convert, base, pipe, tmp_path):
    weights = {f"model.{name}": tensor for name, tensor in original_weights(pipe.transformer).items()}
    save_file(weights, tmp_path / "krea.safetensors")
    out = tmp_path / "out"
    convert(
        *("--recipe", "krea-14b", "--checkpoint", tmp_path / "krea.safetensors", "--base", base),
        *("--output_dir", out, "--dtype", "bfloat16"),
    )
    saved = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    expected = pipe.transformer.state_dict()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name].bfloat16()) for name, tensor in saved.items())


def test_shards(pipe, tmp_path, monkeypatch):
    """As diffusers reads them: no file above the limit, every tensor in one of them."""
    weights = pipe.transformer.state_dict()
    limit = sum(tensor.nbytes for tensor in weights.values()) // 3
    pipe.transformer.save_config(tmp_path)
    monkeypatch.setattr("astrolabe_diffusers.conversion.convert._SHARD_BYTES", limit)
    save_shards({name: tensor.nbytes for name, tensor in weights.items()}, weights.get, tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) in (3, 4, 5)
    assert all(sum(tensor.nbytes for tensor in load_file(file).values()) <= limit for file in files)
    loaded = type(pipe.transformer).from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.items())


def original_lora(pipe, rank: int, prefix: str) -> dict[str, torch.Tensor]:
    """On every linear layer of the blocks, as LongLive's; both matrices are random."""
    generator, lora, weights = torch.Generator().manual_seed(1), {}, pipe.transformer.state_dict()
    for original, name in original_names(pipe.transformer.config.num_layers).items():
        weight = weights[name]
        if original.startswith("blocks.") and original.endswith(".weight") and weight.ndim == 2:
            module = prefix + original.removesuffix(".weight")
            lora[f"{module}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=generator) * 0.3
            lora[f"{module}.lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=generator) * 0.3
    return lora


def merged(pipe, lora, prefix, scale):
    """A second pipeline with W + scale B A, written out."""
    result = small_pipeline()
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


@pytest.fixture(scope="module")
def made_with_lora(pipe):
    """By scale."""
    return {scale: video(merged(pipe, original_lora(pipe, 4, ""), "", scale)) for scale in (1.0, 2.0)}


@pytest.mark.parametrize("layout", LORAS)
def test_lora(layout, convert, pipe, base, checkpoint, made, made_with_lora, tmp_path):
    """Loaded, it changes the model as B A says; merged, it is the same; trained on, it has its rank and alpha."""
    prefix, scale = LORAS[layout]
    lora = original_lora(pipe, 4, prefix)
    expected = made_with_lora[scale]
    assert (expected - made).abs().max() > 0.01
    path = write_lora(tmp_path / "original", layout, lora)

    convert("--lora", path, "--output_dir", tmp_path / "lora")
    loaded = small_pipeline()
    loaded.load_lora_weights(tmp_path / "lora", adapter_name="default")
    assert (video(loaded) - expected).abs().max() < 1e-4
    config = loaded.transformer.peft_config["default"]
    assert isinstance(config, LoraConfig) and (config.r, config.lora_alpha) == (4, 4 * scale)

    convert(
        *("--recipe", "longlive", "--checkpoint", checkpoint, "--base", base, "--lora", path),
        *("--output_dir", tmp_path / "merged"),
    )
    assert (video(DiffusionPipeline.from_pretrained(tmp_path / "merged")) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda lora: lora.update({"step": torch.zeros(1)}), "is no LoRA of Wan, or not only: it holds step"),
        (lambda lora: lora.pop(next(iter(lora))), "blocks.0.ffn.net.0.proj has B but no A"),
        (lambda lora: lora.clear(), "is no LoRA: it is empty"),
        (lambda lora: lora.update({next(iter(lora)): torch.zeros(5, 24)}), "A is (5, 24) and B (32, 4)"),
    ],
)
def test_lora_files_that_are_none(change, message, convert, pipe, tmp_path, capsys):
    lora = original_lora(pipe, 4, "")
    change(lora)
    torch.save(lora, tmp_path / "lora.pt")
    convert("--lora", tmp_path / "lora.pt", "--output_dir", tmp_path / "out", exit_code=2)
    assert message in capsys.readouterr().err


@pytest.fixture
def fails(convert, capsys):
    """The command ends with code 2 and one line."""

    def run(message, *args):
        capsys.readouterr()
        convert(*args, exit_code=2)
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
        assert message in captured.err

    return run


def test_what_a_user_gets_wrong(fails, base, checkpoint, tmp_path):
    out = ("--output_dir", tmp_path / "new" / "out")
    model = ("--recipe", "self-forcing", "--checkpoint", checkpoint)
    fails("nothing to convert", *out)
    fails("output_dir is missing", *model, "--base", base)
    fails("checkpoint needs recipe and base", "--checkpoint", checkpoint, *out)
    fails("no published model 'self-forcng' (did you mean self-forcing or", "--model", "self-forcng", *out)
    fails("No such file", "--recipe", tmp_path / "mine.yaml", *out)
    recipes = {"sigma: [1.0]": "pipeline has no `sigma` (did you mean sigmas?)", "sigmas: [0.5, 1]": "must fall from"}
    for settings, words in recipes.items():
        (tmp_path / "mine.yaml").write_text(f"source: me/mine, m.pt\npipeline: {{{settings}}}")
        own = ("--recipe", tmp_path / "mine.yaml", "--checkpoint", checkpoint, "--weights", "generator")
        fails(words, *own, "--base", base, *out)
    fails("unknown argument --outputdir (did you mean --output_dir?)", *model, "--outputdir", "x", *out)
    fails("--recipe is given twice", *model, *model, *out)
    for flag in ("dtype", "weights", "base", "recipe"):
        value = {"dtype": "float16", "recipe": "longlive"}.get(flag, "x")
        fails(f"{flag} needs checkpoint", "--lora", "x", f"--{flag}", value, *out)
    fails("hub_model_id needs push_to_hub", "--lora", "x", "--hub_model_id", "x", *out)
    fails("no such file", "--recipe", "self-forcing", "--checkpoint", tmp_path / "nothing.pt", "--base", base, *out)
    fails("no entry ema; there are generator, generator_ema", *model, "--base", base, "--weights", "ema", *out)
    fails("is no folder here, and the Hub did not give it", *model, "--base", "nobody/nothing", *out)

    for name, content in {"list": [torch.zeros(1)], "tensor": torch.zeros(1), "dict": {}}.items():
        torch.save(content, tmp_path / f"{name}.pt")
        words = "holds no tensors" if name == "dict" else "not tensors by name"
        fails(words, "--recipe", "longlive", "--checkpoint", tmp_path / f"{name}.pt", "--base", base, *out)

    # The base has three layers, the checkpoint two.
    larger = tmp_path / "larger"
    shutil.copytree(base, larger)
    config = json.loads((larger / "transformer" / "config.json").read_text()) | {"num_layers": 3}
    (larger / "transformer" / "config.json").write_text(json.dumps(config))
    fails("27 missing (blocks.2.scale_shift_table, ", *model, "--base", larger, *out)

    (tmp_path / "empty").mkdir()
    fails("it has no tokenizer, text_encoder, vae, transformer", *model, "--base", tmp_path / "empty", *out)
    index = json.loads((larger / "model_index.json").read_text())
    (larger / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "vae"}))
    fails("it has no vae in its model_index.json", *model, "--base", larger, *out)

    other = original_lora(tiny_pipeline(num_layers=3), 4, "")
    torch.save(other, tmp_path / "lora.pt")
    lora = ("--lora", tmp_path / "lora.pt")
    fails("this LoRA changes blocks.2.ffn.net.0.proj", *model, "--base", base, *lora, *out)
    assert not (tmp_path / "new").exists()


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_nothing_is_written_over(convert, fails, base, checkpoint, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("mine")
    shutil.copy(checkpoint, out / "model.pt")
    convert(
        *("--recipe", "longlive", "--checkpoint", out / "model.pt", "--base", base, "--output_dir", out),
        *("--dtype", "float16"),
    )
    first = contents(out)
    assert first["README.md"] == b"mine" and "model.pt" in first and not (out / ".partial").exists()

    command = ("--recipe", "self-forcing", "--checkpoint", out / "model.pt", "--base", base, "--output_dir", out)
    fails("tokenizer is there already: name another output_dir, or `overwrite` it", *command)
    # What is read is not what is written over, not even if asked to.
    converted = out / "transformer" / "diffusion_pytorch_model.safetensors"
    for name, path in {"--checkpoint": converted, "--base": out}.items():
        words = list(command)
        words[words.index(name) + 1] = path
        fails("would be overwritten by what is made of it", *words, "--overwrite")
    assert contents(out) == first

    convert(*command, "--overwrite")
    second = contents(out)
    assert second.keys() == first.keys() and second["README.md"] == b"mine"
    assert json.loads(second["transformer/config.json"])["sink_size"] == 0
    assert {t.dtype for t in load_file(converted).values()} == {torch.float32}

    torch.save(original_lora(tiny_pipeline(), 4, ""), tmp_path / "lora.pt")
    lora = ("--lora", tmp_path / "lora.pt", "--output_dir", tmp_path / "lora")
    convert(*lora)
    fails("pytorch_lora_weights.safetensors is there already", *lora)
    convert(*lora, "--overwrite")


def test_folders_that_cannot_be_written(fails, base, checkpoint, tmp_path):
    command = ("--recipe", "self-forcing", "--checkpoint", checkpoint, "--base", base, "--output_dir")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    fails("File exists", *command, tmp_path / "loop")
    fails("File exists", *command, tmp_path / "file")
    fails("Not a directory", *command, tmp_path / "file" / "out")
    fails("null byte", *command, f"{tmp_path}/a\0b")
    fails("No such file or directory", *command, "/proc/nowhere")
    (tmp_path / "out" / ".partial").mkdir(parents=True)
    fails("another conversion is writing it, or was killed; then remove it", *command, tmp_path / "out")
    assert (tmp_path / "out" / ".partial").exists()


@pytest.mark.parametrize("where", ["a shard", "a copy", "the last file"])
def test_a_full_disk(where, fails, convert, base, checkpoint, tmp_path, monkeypatch):
    """Nothing is left of the new folder; a folder that is to be replaced is as it was."""
    command = ("--recipe", "self-forcing", "--checkpoint", checkpoint, "--base", base, "--output_dir")
    convert(*command, tmp_path / "old")
    before = contents(tmp_path / "old")
    if where == "a shard":  # as the library says it
        error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        monkeypatch.setattr("safetensors.torch.save_file", Mock(side_effect=error))
    else:
        error = OSError(errno.ENOSPC, "No space left on device")
        target = "shutil.copyfile" if where == "a copy" else "pathlib.Path.write_text"
        monkeypatch.setattr(target, Mock(side_effect=error))
    fails("No space left on device", *command, tmp_path / "new")
    fails("No space left on device", *command, tmp_path / "old", "--overwrite")
    assert not (tmp_path / "new").exists() and contents(tmp_path / "old") == before


def test_an_interrupted_conversion_leaves_nothing(convert, base, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("safetensors.torch.save_file", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert("--recipe", "longlive", "--checkpoint", checkpoint, "--base", base, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_have_the_mode_of_the_umask(convert, base, checkpoint, pipe, tmp_path):
    torch.save(original_lora(pipe, 4, ""), tmp_path / "lora.pt")
    shutil.copytree(base, tmp_path / "base")
    for file in (tmp_path / "base").rglob("*"):
        file.chmod(0o555 if file.is_dir() else 0o400)
    previous = os.umask(0o027)
    try:
        convert(
            *("--recipe", "longlive", "--checkpoint", checkpoint, "--base", tmp_path / "base"),
            *("--output_dir", tmp_path / "out"),
        )
        convert("--lora", tmp_path / "lora.pt", "--output_dir", tmp_path / "out")
    finally:
        os.umask(previous)
        for folder in (tmp_path / "base").rglob("*/"):
            folder.chmod(0o755)
    modes = {file.is_dir(): stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").rglob("*")}
    assert modes == {True: 0o750, False: 0o640}
    assert all(stat.S_IMODE(file.stat().st_mode) == modes[file.is_dir()] for file in (tmp_path / "out").rglob("*"))


def test_weights_go_before_the_authors_choice(convert, base, pipe, tmp_path):
    weights = original_weights(pipe.transformer)
    other = {key: tensor + 1 for key, tensor in weights.items()}
    torch.save({"generator_ema": other, "generator": weights}, tmp_path / "m.pt")
    convert(
        *("--recipe", "self-forcing", "--checkpoint", tmp_path / "m.pt", "--base", base, "--weights", "generator"),
        *("--output_dir", tmp_path / "out"),
    )
    converted = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, converted[key]) for key, tensor in pipe.transformer.state_dict().items())


def test_8_bit_shards(convert, base, pipe, tmp_path):
    """Scaled 8-bit weights in a folder of shards become what they stand for, at once or in bfloat16."""
    stored, expected = {}, {}
    names = original_names(pipe.transformer.config.num_layers)
    for original, weight in original_weights(pipe.transformer).items():
        stored[original] = expected[names[original]] = weight
        if weight.ndim == 2:
            scale = weight.abs().max() / 448
            stored[original] = (weight / scale).to(torch.float8_e4m3fn)
            stored[original.removesuffix(".weight") + ".scale_weight"] = scale
            expected[names[original]] = stored[original].float() * scale
    (tmp_path / "shards").mkdir()
    keys, files = list(stored), {}
    for i in range(2):
        save_file({key: stored[key] for key in keys[i::2]}, tmp_path / "shards" / f"{i}.safetensors")
        files |= dict.fromkeys(keys[i::2], f"{i}.safetensors")
    (tmp_path / "shards" / "m.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    for dtype in (torch.float32, torch.bfloat16):
        out = tmp_path / str(dtype)
        flag = [] if dtype == torch.float32 else ["--dtype", "bfloat16"]
        convert(
            *("--recipe", "krea-14b", "--checkpoint", tmp_path / "shards", "--base", base, "--output_dir", out, *flag)
        )
        converted = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
        assert converted.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name].to(dtype)) for name, tensor in converted.items())


def test_push(convert, base, checkpoint, fails, tmp_path, monkeypatch, capsys):
    """The Hub is asked before the work; what else lies in the folder stays here."""
    hub = Mock()
    hub.create_repo.side_effect = OSError("401: Invalid\nusername or password.")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    out = tmp_path / "my-model"
    command = (
        "--recipe",
        "longlive",
        "--checkpoint",
        checkpoint,
        "--base",
        base,
        "--output_dir",
        out,
        "--push_to_hub",
    )
    fails("push_to_hub: cannot create my-model: 401: Invalid username or password.", *command)
    assert not out.exists()
    hub.create_repo.side_effect = None
    hub.create_repo.return_value.repo_id = "me/my-model"
    convert(*command)
    asked = hub.upload_folder.call_args.kwargs
    assert asked["repo_id"] == "me/my-model" and asked["folder_path"] == out
    assert {"transformer/*", "model_index.json"} <= set(asked["allow_patterns"]) and "*" not in asked["allow_patterns"]
    hub.upload_folder.side_effect = OSError("the Hub is being repaired")
    convert(*command, "--overwrite", exit_code=2)
    error = capsys.readouterr().err
    assert "not pushed to me/my-model: the Hub is being repaired. Later: hf upload me/my-model" in error
