"""Published layouts become ours, tensor by tensor, and nothing else does."""

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file

from astrolabe_diffusers import CausalWanTransformer3DModel
from astrolabe_diffusers.loaders.original_checkpoints import infer_config, to_diffusers
from tests.loaders.original_layout import original_names, original_weights
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
        "generator": prefixed({k: v + 1 for k, v in w.items()}, "model."),
        "generator_ema": prefixed(inside_blocks(w, "_fsdp_wrapped_module"), "model._fsdp_wrapped_module."),
    },
    "compiled, checkpointed, DDP": lambda w: {
        "model": prefixed(inside_blocks(w, "_checkpoint_wrapped_module"), "module._orig_mod.")
    },
    "ComfyUI": lambda w: prefixed(w, "model.diffusion_model."),
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


def test_which_weights_are_taken(transformer):
    weights = original_weights(transformer)
    checkpoint = {"generator": weights, "generator_ema": {k: v + 1 for k, v in weights.items()}}
    name = "proj_out.weight"
    assert torch.equal(load(checkpoint).state_dict()[name], transformer.state_dict()[name] + 1)
    assert torch.equal(load(checkpoint, weights=("generator",)).state_dict()[name], transformer.state_dict()[name])


def test_dtype_keeps_what_diffusers_keeps_in_float32(transformer, tmp_path):
    loaded = load(original_weights(transformer), dtype=torch.bfloat16)
    transformer.save_pretrained(tmp_path)
    expected = CausalWanTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in loaded.state_dict().items()}
    assert dtypes == {name: tensor.dtype for name, tensor in expected.state_dict().items()}
    assert set(dtypes.values()) == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize("heads,layers,ffn_dim,tensors", [(12, 30, 8960, 825), (40, 40, 13824, 1095)])
def test_full_size_names_and_sizes(heads, layers, ffn_dim, tensors):
    with init_empty_weights():
        model = CausalWanTransformer3DModel(num_attention_heads=heads, num_layers=layers, ffn_dim=ffn_dim)
    shapes = model.state_dict()
    original = {name: shapes[new] for name, new in original_names(layers).items()}
    assert len(original) == tensors
    converted = to_diffusers(original)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in shapes.items()}
    sizes = infer_config(converted)
    assert sizes == {name: model.config[name] for name in sizes}


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
    with init_empty_weights():
        large = CausalWanTransformer3DModel().state_dict()
    weights = {name: large[new] for name, new in original_names(40).items()}
    with pytest.raises(ValueError, match=r"It looks like Wan2.1 14B \(width 5120, 40 layers\)"):
        CausalWanTransformer3DModel.from_single_file(weights, num_layers=30)


def test_no_wan_transformer():
    with pytest.raises(ValueError, match="no Wan transformer"):
        load({"conv.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match="holds critic, step, and none of generator_ema, generator, model"):
        load({"critic": {}, "step": 3})


def test_two_tensors_of_one_name(transformer):
    weights = original_weights(transformer)
    weights["model.head.modulation"] = weights["head.modulation"]
    with pytest.raises(ValueError, match="two tensors of this checkpoint mean scale_shift_table"):
        load(weights)


class Payload:
    """Unpickling it would call `__init__` of whatever it names."""


def test_files_that_are_refused(tmp_path):
    torch.save({"generator": Payload()}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="would run code from the file, which is refused"):
        load(tmp_path / "code.pt")
    for name in ("torn.pt", "torn.safetensors"):
        (tmp_path / name).write_bytes(b"no checkpoint")
        with pytest.raises(ValueError, match="refused|no readable checkpoint"):
            load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load(tmp_path / "nothing.pt")
