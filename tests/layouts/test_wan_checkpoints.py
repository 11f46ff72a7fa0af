"""Published layouts become ours, tensor by tensor, and nothing else does."""

import functools

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from astrolabe_diffusers import CausalWanTransformer3DModel
from astrolabe_diffusers.layouts.published_models import PUBLISHED_MODELS
from astrolabe_diffusers.layouts.wan_checkpoints import infer_config, to_diffusers
from tests.layouts.original_layout import PUBLISHED_LAYOUTS, original_names, original_weights, published_checkpoint
from tests.tiny_pipeline import tiny_transformer


HEADS = {"attention_head_dim": 12, "num_attention_heads": 2}


def load(checkpoint, **kwargs):
    return CausalWanTransformer3DModel.from_single_file(checkpoint, **HEADS, **kwargs)


@pytest.fixture
def transformer():
    return tiny_transformer()


def prefixed(weights, prefix):
    return {prefix + name: tensor for name, tensor in weights.items()}


def inside_blocks(weights, infix):
    """FSDP wraps each block, so the infix comes after its number."""
    renamed = {}
    for name, tensor in weights.items():
        parts = name.split(".")
        if parts[0] == "blocks":
            parts.insert(2, infix)
        renamed[".".join(parts)] = tensor
    return renamed


LAYOUTS = {
    "flat": lambda w: w,
    "generator": lambda w: {"generator": prefixed(w, "model."), "critic": {"x": torch.zeros(1)}},
    "ema of FSDP": lambda w: {
        "critic": prefixed({k: v + 1 for k, v in w.items()}, "model."),
        "generator_ema": prefixed(inside_blocks(w, "_fsdp_wrapped_module"), "model._fsdp_wrapped_module."),
    },
    "compiled, checkpointed, DDP": lambda w: {
        "model": prefixed(inside_blocks(w, "_checkpoint_wrapped_module"), "module._orig_mod.")
    },
    "ComfyUI": lambda w: prefixed(w, "model.diffusion_model."),
    "ComfyUI, diffusion model alone": lambda w: prefixed(w, "diffusion_model."),
    "transformer of a pipeline": lambda w: prefixed(w, "transformer."),
    "DiffSynth": lambda w: prefixed(w, "pipe.dit."),
    "net": lambda w: prefixed(w, "net."),
    "Lightning": lambda w: {"state_dict": prefixed(w, "model."), "epoch": 1, "callbacks": {"x": {}}},
    "DeepSpeed": lambda w: {"module": prefixed(w, "module."), "optimizer": None, "lr": 0.1},
    "with a counter": lambda w: w | {"step": torch.tensor(3), "num_updates": torch.tensor([3], dtype=torch.int32)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_every_layout_loads_equal(transformer, layout, suffix, tmp_path):
    checkpoint, path = LAYOUTS[layout](original_weights(transformer)), tmp_path / f"model{suffix}"
    if suffix == ".pt":
        torch.save(checkpoint, path)
    elif all(isinstance(v, torch.Tensor) for v in checkpoint.values()):
        save_file(checkpoint, path)
    else:
        pytest.skip("safetensors files are flat")
    loaded = load(path, sink_size=3, local_attn_size=9)
    expected = transformer.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.config.sink_size == 3 and loaded.config.local_attn_size == 9 and not loaded.training
    # It runs: no parameter or table was left on the meta device.
    inputs = torch.randn(1, 4, 3, 4, 4), torch.full((1,), 625.0), torch.randn(1, 16, 32)
    assert torch.equal(loaded(*inputs).sample, transformer(*inputs).sample)


def test_diffusers_own_layout(transformer, tmp_path):
    """A stock Wan folder, in three shards, and its index; sizes and heads from its config."""
    names = ("patch_size", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim")
    names += ("freq_dim", "ffn_dim", "num_layers", "rope_max_seq_len")
    stock = WanTransformer3DModel(**{name: transformer.config[name] for name in names})
    stock.load_state_dict(transformer.state_dict())
    size = sum(tensor.nbytes for tensor in stock.state_dict().values())
    stock.save_pretrained(tmp_path / "transformer", max_shard_size=size // 2)
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    (index,) = (tmp_path / "transformer").glob("*.index.json")
    for checkpoint in (tmp_path / "transformer", index):
        loaded = CausalWanTransformer3DModel.from_single_file(checkpoint, config=tmp_path).state_dict()
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in transformer.state_dict().items())


def test_which_weights_are_taken(transformer):
    weights = original_weights(transformer)
    checkpoint = {"generator": weights, "generator_ema": {k: v + 1 for k, v in weights.items()}, "critic": weights}

    def difference(checkpoint=checkpoint, **kwargs):
        loaded = load(checkpoint, **kwargs)
        return (loaded.state_dict()["proj_out.bias"] - transformer.state_dict()["proj_out.bias"]).mean().round().item()

    with pytest.raises(ValueError, match="holds generator_ema and generator: say which is meant with `weights`, or "):
        load(checkpoint)
    assert difference(weights="generator") == 0
    assert difference(weights=("ema", "generator_ema", "generator")) == 1
    # As the models' authors load them.
    emas = {"self-forcing": 1, "causal-forcing-chunkwise": 0, "causal-forcing-framewise": 1, "longlive": 0}
    assert {recipe: difference(recipe=recipe) for recipe in emas} == emas
    assert difference(recipe="self-forcing", weights="generator") == 0
    with pytest.raises(ValueError, match="holds generator_ema and generator: say which"):
        load(checkpoint, recipe="krea-14b")
    # A training of one's own from that model.
    assert difference({"state_dict": weights, "step": 3}, recipe="self-forcing") == 0
    assert difference({"generator": weights}) == 0
    with pytest.raises(ValueError, match="no entry emma; there are generator, generator_ema, critic"):
        load(checkpoint, weights="emma")
    with pytest.raises(ValueError, match="no entry generator; its tensors have no entries: leave `weights` out"):
        load(weights, weights="generator")


def test_a_recipe_is_the_model_s_config_too(transformer):
    weights = original_weights(transformer)
    config = load(weights, recipe="longlive").config
    assert (config.num_frames_per_block, config.sink_size, config.local_attn_size) == (3, 3, 12)
    config = load(weights, recipe="causal-forcing-framewise", local_attn_size=9).config
    assert (config.num_frames_per_block, config.sink_size, config.local_attn_size) == (1, 0, 9)
    with pytest.raises(ValueError, match=r"no published model 'long-live' \(did you mean longlive or .*there are"):
        load(weights, recipe="long-live")


SCALES = {
    # Kijai's and Comfy-Org's files; the scale is one number.
    ".scale_weight": lambda weight: (weight.abs().max() / 448).reshape([1]),
    # ComfyUI's newer files.
    ".weight_scale": lambda weight: weight.abs().max() / 448,
    # lightx2v's: one for each row.
    "rows": lambda weight: weight.abs().amax(1, keepdim=True) / 448,
    "rows, flat": lambda weight: weight.abs().amax(1) / 448,
}


def as_json(text):
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize("kind", SCALES)
def test_8_bit_weights_with_scales(kind, dtype, prefix, tmp_path):
    transformer = tiny_transformer(num_layers=1)
    name = kind if kind.startswith(".") else ".weight_scale"
    stored, expected = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}, {}
    names = original_names(transformer.config.num_layers)
    for original, weight in original_weights(transformer).items():
        stored[original] = expected[names[original]] = weight.half()
        if weight.ndim == 2 and original.startswith("blocks."):
            scale, module = SCALES[kind](weight), original.removesuffix(".weight")
            rows = scale if scale.ndim != 1 else scale[:, None]
            stored[original] = (weight / rows / (4 if dtype == torch.int8 else 1)).to(dtype)
            stored |= {module + name: scale, module + ".input_scale": torch.ones(1)}
            expected[names[original]] = stored[original].float() * rows
            if name == ".weight_scale":
                stored[module + ".comfy_quant"] = as_json('{"format": "float8_e4m3fn"}')
    save_file(prefixed(stored, prefix), tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors").state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in expected.items())
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    half = load(tmp_path / "m.safetensors", dtype=torch.bfloat16).state_dict()
    assert torch.equal(half["blocks.0.attn1.to_q.weight"], expected["blocks.0.attn1.to_q.weight"].bfloat16())


def test_8_bit_weights_without_scales(transformer):
    weights = {name: tensor.to(torch.float8_e5m2) for name, tensor in original_weights(transformer).items()}
    loaded, names = load(weights).state_dict(), original_names(transformer.config.num_layers)
    assert all(torch.equal(loaded[names[name]], tensor.float()) for name, tensor in weights.items())


@pytest.mark.parametrize(
    "change,message",
    [
        ({"blocks.0.ffn.0.weight_scale": torch.ones(5)}, "blocks.0.ffn.net.0.proj.weight has 5 scales: one is supp"),
        ({"blocks.0.ffn.0.comfy_quant": as_json('{"format": "nvfp4"}')}, "is quantised as nvfp4; what is supported"),
        ({"blocks.0.ffn.0.weight": torch.zeros(32, 12, dtype=torch.uint8)}, "proj.weight is of uint8, which is no we"),
        ({"blocks.0.ffn.0.weight_scale_inv": torch.ones(1)}, r"1 unexpected \(blocks.0.ffn.net.0.proj.weight_sc"),
        ({"blocks.9.ffn.0.weight_scale": torch.ones(1)}, r"1 unexpected \(blocks.9.ffn.net.0.proj.weight_scale"),
    ],
)
def test_8_bit_weights_of_other_kinds(transformer, change, message):
    with pytest.raises(ValueError, match=message):
        load(original_weights(transformer) | change)


def test_arguments_of_from_single_file(transformer, tmp_path):
    weights = original_weights(transformer)
    assert load(weights, torch_dtype=torch.bfloat16).dtype == load(weights, dtype=torch.bfloat16).dtype
    assert load(weights, torch_dtype=torch.bfloat16).proj_out.weight.dtype == torch.bfloat16
    assert load(weights, device="cpu", low_cpu_mem_usage=True, local_files_only=True, token=None).device.type == "cpu"
    torch.save(weights, tmp_path / "m.pt")
    assert torch.equal(load(tmp_path / "m.pt", disable_mmap=True).proj_out.weight, transformer.proj_out.weight)

    def fails(message, **kwargs):
        with pytest.raises(ValueError, match=message) as error:
            load(weights, **kwargs)
        assert "\n" not in str(error.value)

    fails(r"takes no `num_frame_per_block` \(did you mean num_frames_per_block\?\)", num_frame_per_block=1)
    fails(r"takes no `recipes` \(did you mean recipe", recipes="longlive")
    fails("takes no `quantization_config`", quantization_config=object())
    fails("takes no `nonsense`; it takes its own arguments", nonsense=1)
    fails("`dtype` must be a floating-point torch.dtype", dtype="bfloat16")
    fails("`dtype` must be a floating-point torch.dtype", torch_dtype=torch.int8)
    with pytest.raises(ValueError, match="a width of 24 is no whole number of heads of 128: give `att"):
        CausalWanTransformer3DModel.from_single_file(weights)
    # The number of heads follows from their size.
    loaded = CausalWanTransformer3DModel.from_single_file(weights, attention_head_dim=12)
    assert loaded.config.num_attention_heads == 2
    # What is there is left as it is: the weights are copies.
    loaded.proj_out.weight.data.zero_()
    assert torch.equal(weights["head.head.weight"], transformer.proj_out.weight)


def test_dtype_keeps_what_diffusers_keeps_in_float32(transformer, tmp_path):
    loaded = load(original_weights(transformer), dtype=torch.bfloat16)
    transformer.save_pretrained(tmp_path)
    expected = CausalWanTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in loaded.state_dict().items()}
    assert dtypes == {name: tensor.dtype for name, tensor in expected.state_dict().items()}
    assert set(dtypes.values()) == {torch.bfloat16, torch.float32}


@functools.cache
def full_size(heads, layers, ffn_dim):
    with init_empty_weights():
        return CausalWanTransformer3DModel(num_attention_heads=heads, num_layers=layers, ffn_dim=ffn_dim)


@pytest.mark.parametrize("heads,layers,ffn_dim,tensors", [(12, 30, 8960, 825), (40, 40, 13824, 1095)])
def test_full_size_names_and_sizes(heads, layers, ffn_dim, tensors):
    model = full_size(heads, layers, ffn_dim)
    shapes = model.state_dict()
    original = {name: shapes[new] for name, new in original_names(layers).items()}
    assert len(original) == tensors
    converted = to_diffusers(original)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in shapes.items()}
    sizes = infer_config(converted)
    assert sizes == {name: model.config[name] for name in sizes}


@pytest.mark.parametrize("recipe", PUBLISHED_LAYOUTS)
def test_every_published_model_at_full_size(recipe):
    """All names of its file, without values, in its layout: each has a place in the model, which has no other."""
    heads, layers, ffn_dim, count = (40, 40, 13824, 1095) if "14b" in recipe else (12, 30, 8960, 825)
    shapes = full_size(heads, layers, ffn_dim).state_dict()
    checkpoint = published_checkpoint(recipe, {name: shapes[new] for name, new in original_names(layers).items()})
    model = CausalWanTransformer3DModel.from_single_file(checkpoint, recipe=recipe)
    loaded = model.state_dict()
    assert len(loaded) == count and {k: v.shape for k, v in loaded.items()} == {k: v.shape for k, v in shapes.items()}
    assert PUBLISHED_MODELS[recipe].transformer.items() <= model.config.items()
    entry, _ = PUBLISHED_LAYOUTS[recipe]
    tensors = checkpoint if entry is None else checkpoint[entry]
    tensors.popitem()
    with pytest.raises(ValueError, match="1 missing"):
        CausalWanTransformer3DModel.from_single_file(checkpoint, recipe=recipe)


def test_every_published_model_has_a_layout():
    assert PUBLISHED_LAYOUTS.keys() == PUBLISHED_MODELS.keys()


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda w: w.pop("blocks.1.ffn.2.bias"), r"1 missing \(blocks.1.ffn.net.2.bias\)"),
        (lambda w: w.update({"blocks.1.extra": torch.zeros(1)}), r"1 unexpected \(blocks.1.extra\)"),
        (
            lambda w: w.update({"head.modulation": torch.zeros(1, 3, 24)}),
            r"1 of another shape \(scale_shift_table \(1, 3, 24\) for \(1, 2, 24\)\)",
        ),
        (lambda w: [w.pop(k) for k in list(w) if k.startswith("blocks.1.self_attn")], r"10 missing \(.*, \.\.\.\)"),
    ],
)
def test_strict(transformer, change, message):
    weights = original_weights(transformer)
    change(weights)
    with pytest.raises(ValueError, match=message + r".*It looks like a Wan transformer of width 24, 2 layers\.$"):
        load(weights)


def test_says_which_published_model_it_is():
    large = full_size(40, 40, 13824).state_dict()
    weights = {name: large[new] for name, new in original_names(40).items()}
    with pytest.raises(ValueError, match=r"It looks like Wan2.1 14B \(width 5120, 40 layers\)"):
        CausalWanTransformer3DModel.from_single_file(weights, num_layers=30)


def with_lora(weights):
    """As PEFT keeps a model with a LoRA; and the LoRA alone."""
    model, lora = {}, {}
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and tensor.ndim == 2:
            lora[f"base_model.model.{module}.lora_A.default.weight"] = torch.zeros(2, tensor.shape[1])
            lora[f"base_model.model.{module}.lora_B.default.weight"] = torch.zeros(tensor.shape[0], 2)
            name = f"{module}.base_layer.weight"
        model[f"base_model.model.{name}"] = tensor
    return model | lora, lora


@pytest.mark.parametrize(
    "kind, words",
    [
        ("RAVEN's full file", "a model with a LoRA beside its weights.*take the file with both merged"),
        ("a LoRA", "a LoRA: merge it"),
        ("image to video", "a model of images to videos"),
        ("autoencoder", "an autoencoder or a decoder"),
        ("5B", r"Wan2.2 5B \(LongLive 2.0\) \(width 3072, 30 layers\)"),
    ],
)
def test_files_of_other_models(transformer, kind, words):
    """Their names tell what they are."""
    weights = original_weights(transformer)
    large = full_size(24, 30, 14336).state_dict() if kind == "5B" else {}
    checkpoint = {
        "RAVEN's full file": with_lora(weights)[0],
        "a LoRA": with_lora(weights)[1],
        "image to video": weights | {"img_emb.proj.0.weight": torch.zeros(8), "x.k_img.weight": torch.zeros(8)},
        "autoencoder": {"encoder.conv1.weight": torch.zeros(1), "decoder.conv1.weight": torch.zeros(1)},
        "5B": {name: large.get(new) for name, new in original_names(30).items()},
    }[kind]
    config = {"num_layers": 40} if kind == "5B" else HEADS
    with pytest.raises(ValueError, match=f"It looks like {words}") as error:
        CausalWanTransformer3DModel.from_single_file(checkpoint, recipe="raven", **config)
    assert "\n" not in str(error.value)


def test_no_wan_transformer():
    with pytest.raises(ValueError, match="no Wan transformer"):
        load({"conv.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match="holds critic, step, and none of generator_ema, generator, model"):
        load({"critic": {}, "step": 3})
    with pytest.raises(ValueError, match="holds no tensors"):
        load({})
    with pytest.raises(ValueError, match="no Wan transformer"):
        load({"patch_embedding.weight": torch.zeros(24)})
    with pytest.raises(FileNotFoundError, match="no such file"):
        load("nothing.pt")


def test_two_tensors_of_one_name(transformer):
    weights = original_weights(transformer)
    weights["model.head.modulation"] = weights["head.modulation"]
    with pytest.raises(ValueError, match="two tensors of this checkpoint mean scale_shift_table"):
        load(weights)
