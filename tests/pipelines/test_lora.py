"""LoRAs of files in a pipeline: weights, several of them, fusing, saving."""

import copy
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors.torch import save_file

from astrolabe_diffusers.models.lora_layers import adapter_weights, lora_weights_of, tuner_layers
from astrolabe_diffusers.pipelines.loading import lora_digest
from tests.layouts.test_lora_modules import KOHYA, distilled, matrices, merged, output, write
from tests.tiny_pipeline import tiny_pipeline


@pytest.fixture(scope="module")
def base():
    return output(tiny_pipeline().transformer)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A distilled model's LoRA with whole differences, and a plain one on other modules, and what makes them up."""
    folder = tmp_path_factory.mktemp("loras")
    path, lora, whole = distilled(folder)
    plain = matrices(ranks={"blocks.0.self_attn.k": (3, 6.0), "blocks.1.self_attn.q": (2, 2.0)})
    second = write(folder / "plain.safetensors", lambda module: module, "lora_A.weight", "lora_B.weight", plain, False)
    return path, lora, whole, second, plain


@pytest.fixture
def loaded(files):
    pipe = tiny_pipeline()
    pipe.load_lora_weights(files[0], adapter_name="distilled")
    return pipe


def expected(files, weight, other=0.0):
    """W + weight (scale B A + differences) + other B' A'."""
    _, lora, whole, _, plain = files
    lora = {module: (a, b, weight * alpha) for module, (a, b, alpha) in lora.items()}
    additions = [(name, weight * tensor) for name, tensor in whole.items()]
    transformer_weights = {}
    for module, (a, b, _) in plain.items():
        transformer_weights[f"{module}.weight"] = other * b @ a
    sums = dict(transformer_weights)
    for name, tensor in additions:
        sums[name] = sums.get(name, 0) + tensor
    return merged(lora, additions=sums)


def close(pipe, result, tolerance=1e-5):
    return (output(pipe.transformer) - result).abs().max() < tolerance


def test_weight_scale_disabling_and_unloading(loaded, files, base):
    assert close(loaded, expected(files, 1)) and not close(loaded, base, 0.1)
    for weight in (0.5, 0.0, -0.7, 2.0):
        loaded.set_adapters("distilled", weight)
        assert close(loaded, expected(files, weight))
    loaded.set_adapters("distilled", 0.6)
    loaded.disable_lora()
    assert torch.equal(output(loaded.transformer), base)
    loaded.enable_lora()
    assert close(loaded, expected(files, 0.6))
    loaded.unload_lora_weights()
    assert torch.equal(output(loaded.transformer), base)
    names = tiny_pipeline().transformer.state_dict().keys()
    assert loaded.transformer.state_dict().keys() == names


def test_two_loras(loaded, files, base):
    loaded.load_lora_weights(files[3], adapter_name="plain")
    for weights in ((1.0, 1.0), (0.3, 2.0), (1.0, 0.0), (0.0, 0.5)):
        loaded.set_adapters(["distilled", "plain"], list(weights))
        assert close(loaded, expected(files, *weights))
    loaded.set_adapters("plain", 1.0)
    assert close(loaded, expected(files, 0, 1))
    loaded.delete_adapters("distilled")
    assert close(loaded, expected(files, 0, 1))
    # And the other way round, under names of diffusers' own.
    other = tiny_pipeline()
    other.load_lora_weights(files[3])
    other.load_lora_weights(files[0])
    other.set_adapters(["default_0", "default_1"])
    assert close(other, expected(files, 1, 1))


def test_names_of_loras_that_have_no_module_in_common(tmp_path):
    pipe = tiny_pipeline()
    for i, name in enumerate(("q", "k", "v")):
        lora = matrices(ranks={f"blocks.0.self_attn.{name}": (2, 2.0)})
        pipe.load_lora_weights(write(tmp_path / name, str, "lora_A.weight", "lora_B.weight", lora, alpha=False))
    assert pipe.get_list_adapters() == {"transformer": ["default_0", "default_1", "default_2"]}
    with pytest.raises(ValueError, match="there is a LoRA 'default_1' already.*'default_0', 'default_1'"):
        pipe.load_lora_weights(tmp_path / "q", adapter_name="default_1")


def test_fusing(loaded, files, base):
    loaded.set_adapters("distilled", 0.5)
    loaded.fuse_lora()
    assert close(loaded, expected(files, 0.5))
    loaded.unfuse_lora()
    assert close(loaded, expected(files, 0.5))
    loaded.fuse_lora()
    loaded.unload_lora_weights()
    assert close(loaded, expected(files, 0.5))


def test_the_scale_of_fusing_ends_with_it(loaded, files):
    """Also where it is taken out by disabling, and of each LoRA its own."""
    loaded.load_lora_weights(files[3], adapter_name="plain")
    loaded.set_adapters(["distilled", "plain"], [0.8, 0.4])
    unfuse = {
        "pipeline": loaded.unfuse_lora,
        "transformer": loaded.transformer.unfuse_lora,
        "disabling": lambda: (loaded.disable_lora(), loaded.enable_lora()),
        "fused at 0": loaded.unfuse_lora,
    }
    for name, call in unfuse.items():
        scale = 0.0 if name == "fused at 0" else 0.5
        loaded.fuse_lora(lora_scale=scale)
        assert close(loaded, expected(files, 0.8 * scale, 0.4 * scale))
        call()
        assert close(loaded, expected(files, 0.8, 0.4))
    loaded.fuse_lora(lora_scale=0.5, adapter_names=["distilled"])
    loaded.fuse_lora(lora_scale=3.0, adapter_names=["plain"])
    assert close(loaded, expected(files, 0.4, 1.2))
    loaded.unfuse_lora()
    assert close(loaded, expected(files, 0.8, 0.4))
    # One that is deleted while it is fused is a part of the weights.
    loaded.fuse_lora(lora_scale=0.5)
    loaded.delete_adapters("plain")
    loaded.unfuse_lora()
    assert close(loaded, expected(files, 0.8, 0.2))
    assert not any("plain" in layer.scaling for layer in tuner_layers(loaded.transformer))


def test_scales_of_fusing_that_are_none(loaded, files):
    for scale in (float("nan"), "1"):
        with pytest.raises(ValueError, match="has to be a finite number"):
            loaded.fuse_lora(lora_scale=scale)
    assert close(loaded, expected(files, 1))
    dora = adapted(use_dora=True)
    before = output(dora.transformer)
    with pytest.raises(ValueError, match="x is a DoRA, which can only be applied with weight 1"):
        dora.fuse_lora(lora_scale=0.0)
    dora.fuse_lora()
    assert close(dora, before)


def test_fusing_that_fails_leaves_weights_as_they_are(loaded, files):
    layer = loaded.transformer.get_submodule("blocks.1.attn1.to_q")
    with torch.no_grad():
        layer.lora_B["distilled"].weight[0, 0] = torch.inf
    before = lora_weights_of(tuner_layers(loaded.transformer))
    with pytest.raises(ValueError, match="NaNs detected"):
        loaded.fuse_lora(lora_scale=0.5, safe_fusing=True)
    loaded.unfuse_lora()
    assert lora_weights_of(tuner_layers(loaded.transformer)) == before


def test_loading_while_one_is_fused(loaded, files):
    """peft would take it out."""
    loaded.fuse_lora()
    with pytest.raises(ValueError, match="a LoRA is fused into the weights: .*, or unload_lora_weights"):
        loaded.load_lora_weights(files[3], adapter_name="plain")
    assert close(loaded, expected(files, 1)) and loaded.get_list_adapters() == {"transformer": ["distilled"]}
    loaded.unload_lora_weights()
    loaded.load_lora_weights(files[3], adapter_name="plain")
    assert close(loaded, expected(files, 1, 1))
    loaded.set_adapters("plain", 0.5)
    assert close(loaded, expected(files, 1, 0.5))


def test_a_fused_lora_keeps_its_weight(loaded, files, base):
    """For it is taken out of the base's weights with the weight that it then has."""
    loaded.load_lora_weights(files[3], adapter_name="plain")
    loaded.set_adapters("distilled", 0.5)
    loaded.fuse_lora()
    calls = {
        "set_adapters": lambda: loaded.set_adapters("distilled", 1.0),
        "another": lambda: loaded.set_adapters("plain"),
        "scale": lambda: output(loaded.transformer, attention_kwargs={"scale": 0.5}),
        "adapter_weights": lambda: adapter_weights(loaded.transformer, {"distilled": 0.0}).__enter__(),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=r"a LoRA is fused into the weights: call unfuse_lora\(\) first"):
            call()
    with adapter_weights(loaded.transformer, {}):  # a live page without LoRAs
        assert close(loaded, expected(files, 0.5))
    assert torch.equal(output(loaded.transformer, attention_kwargs={"scale": 1.0}), output(loaded.transformer))
    loaded.unfuse_lora()
    assert close(loaded, expected(files, 0.5))
    loaded.unload_lora_weights()
    assert close(loaded, base)


@pytest.mark.parametrize("disable", ["disable_lora", "disable_adapters"])
def test_disabling_a_fused_lora(disable, loaded, files, base):
    loaded.fuse_lora()
    getattr(loaded.transformer, disable)()
    with pytest.raises(ValueError, match="disabled cannot be fused: call enable_lora"):
        loaded.fuse_lora()
    assert (output(loaded.transformer, attention_kwargs={"scale": 0.5}) - base).abs().max() < 1e-5
    loaded.enable_lora()
    assert close(loaded, expected(files, 1))
    loaded.unload_lora_weights()
    assert close(loaded, base)


def test_a_copy_is_its_own(loaded, files):
    other = copy.deepcopy(loaded.transformer)
    loaded.set_adapters("distilled", 0.5)
    loaded.fuse_lora()
    assert (output(other) - expected(files, 1)).abs().max() < 1e-5


def test_half_precision_keeps_what_the_model_keeps(files):
    pipe = tiny_pipeline()
    pipe.transformer.to(torch.bfloat16)
    pipe.load_lora_weights(files[0])
    assert {parameter.dtype for parameter in pipe.transformer.parameters()} == {torch.bfloat16}


def test_layers_that_are_offloaded(files, base):
    """Onto the same device here: the hooks know the layers that a LoRA brings, and those that it leaves."""
    pipe = tiny_pipeline()
    device = torch.device("cpu")
    pipe.transformer.enable_group_offload(device, device, offload_type="leaf_level")
    assert close(pipe, base)
    pipe.load_lora_weights(files[0])
    assert close(pipe, expected(files, 1))
    pipe.unload_lora_weights()
    assert close(pipe, base)


def test_compiled_blocks(loaded, files):
    """The repeated blocks are one graph, with whole differences in them and at another scale."""
    loaded.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert close(loaded, expected(files, 1))
    pipe, transformer = loaded, loaded.transformer
    pipe.set_adapters("distilled", 0.5)
    assert close(pipe, expected(files, 0.5))
    latents, text = torch.zeros(1, 4, 3, 8, 8), torch.zeros(1, 16, 32)
    with torch.no_grad():
        scaled = transformer(latents, torch.ones(1), text, attention_kwargs={"scale": 0.0}).sample
        plain = tiny_pipeline().transformer(latents, torch.ones(1), text).sample
    assert (scaled - plain).abs().max() < 1e-5


def test_state_dict_without_metadata(tmp_path):
    """As diffusers' own: what the scales of modules are is then in B."""
    lora = matrices()
    path = write(
        tmp_path / "lora", lambda module: f"diffusion_model.{module}", "lora_down.weight", "lora_up.weight", lora
    )
    pipe = tiny_pipeline()
    pipe.load_lora_weights(pipe.lora_state_dict(path))
    assert close(pipe, merged(lora))


def test_offloaded_sequentially(files):
    """Parameters are then on the meta device, but in the forward of their module."""
    pipe = tiny_pipeline()
    # diffusers' own needs a GPU.
    pipe.enable_sequential_cpu_offload = lambda: cpu_offload(pipe.transformer, torch.device("cpu"))
    pipe.enable_sequential_cpu_offload()
    pipe.load_lora_weights(files[0])
    assert all(parameter.is_meta for parameter in pipe.transformer.parameters())
    assert close(pipe, expected(files, 1))
    with pytest.raises(ValueError, match="there is a LoRA 'default_0' already"):
        pipe.load_lora_weights(files[0], adapter_name="default_0")
    pipe.load_lora_weights(files[3], adapter_name="plain")
    pipe.set_adapters(["default_0", "plain"], [0.0, 1.0])
    assert close(pipe, expected(files, 0, 1))


@pytest.mark.parametrize("compiled", [False, True])
def test_hotswap(compiled, tmp_path, loaded, files):
    """Alphas and ranks of modules come with the LoRA that is swapped in; whole differences do not go with it."""
    first, second = (matrices(ranks={"blocks.0.self_attn.q": rank}) for rank in ((4, 4.0), (2, 3.0)))
    pipe = tiny_pipeline()
    for name, lora in (("first", first), ("second", second)):
        write(tmp_path / name, lambda module: f"diffusion_model.{module}", "lora_down.weight", "lora_up.weight", lora)
    pipe.enable_lora_hotswap(target_rank=8)
    pipe.load_lora_weights(tmp_path / "first", adapter_name="x")
    transformer = pipe.transformer
    if compiled:  # nothing is until it is called
        pipe.transformer = torch.compile(transformer, backend="eager")
    pipe.load_lora_weights(tmp_path / "second", adapter_name="x", hotswap=True)
    pipe.transformer = transformer
    assert (output(transformer) - merged(second)).abs().max() < 1e-5
    for target in (pipe, loaded):
        with pytest.raises(ValueError, match="cannot be swapped"):
            target.load_lora_weights(files[0], adapter_name=target.get_active_adapters()[0], hotswap=True)


def of_one_module(folder, rank, alpha, seed=1):
    """A LoRA of the first query projection: its file, and what makes it up."""
    lora = matrices(ranks={"blocks.0.self_attn.q": (rank, alpha)})
    lora = {module: (seed * a, b, value) for module, (a, b, value) in lora.items()}
    folder.mkdir(exist_ok=True)
    path = folder / f"{rank}-{alpha}-{seed}.safetensors"
    return write(path, lambda module: f"diffusion_model.{module}", *KOHYA, lora), lora


@pytest.mark.parametrize("compiled", [False, True])
def test_scale_of_a_call_where_weights_are_tensors(compiled, tmp_path):
    """As `enable_lora_hotswap` has them, and compiled graphs hold them."""
    path, lora = of_one_module(tmp_path, 4, 2.0)
    (module, (a, b, alpha)), *_ = lora.items()
    pipe = tiny_pipeline()
    pipe.enable_lora_hotswap(target_rank=8)
    pipe.load_lora_weights(path, adapter_name="x")
    if compiled:
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    for scale in (1.0, 0.5, 0.5, 3.0, 1.0):
        result = output(pipe.transformer, attention_kwargs={"scale": scale})
        assert (result - merged({module: (a, b, scale * alpha)})).abs().max() < 1e-5
    pipe.fuse_lora(lora_scale=0.5)
    assert close(pipe, merged({module: (a, b, 0.5 * alpha)}))


# Of modules of the same layers, in which no rank and no alpha is the other's.
FIRST = {"blocks.0.self_attn.q": (4, 2.0), "blocks.1.self_attn.q": (2, 6.0), "head.head": (3, 1.5)}
SECOND = {"blocks.0.self_attn.q": (2, 5.0), "blocks.1.self_attn.q": (4, 1.0)}


@pytest.mark.parametrize("target_rank", [None, 8])
def test_what_is_done_with_a_lora_that_was_swapped_in(target_rank, tmp_path):
    """Weights, saving and swapping again: the old one's ranks and alphas are gone."""
    loras = {"first": matrices(ranks=FIRST), "second": matrices(ranks=SECOND)}
    pipe = tiny_pipeline()
    if target_rank:
        pipe.enable_lora_hotswap(target_rank=target_rank)
    for i, name in enumerate(("first", "second", "first")):
        path = tmp_path / f"{name}.safetensors"
        write(path, lambda module: f"diffusion_model.{module}", *KOHYA, loras[name])
        pipe.load_lora_weights(path, adapter_name="x", hotswap=i > 0)
        whole, half = (merged(loras[name], lambda rank, alpha: weight * alpha / rank) for weight in (1, 0.5))
        assert close(pipe, whole)
        with adapter_weights(pipe.transformer, {"x": 0.5}):
            assert close(pipe, half)
        assert close(pipe, whole)
        for weight, result in ((0.5, half), (1.0, whole)):
            pipe.set_adapters("x", weight)
            assert close(pipe, result)
        pipe.transformer.save_lora_adapter(tmp_path / f"{i}", adapter_name="x")
        fresh = tiny_pipeline()
        fresh.load_lora_weights(tmp_path / f"{i}", adapter_name="x")
        assert close(fresh, whole)


def of_a_kind(kind, seed):
    """Tensors of a LoRA of one module that has also, or has not, a difference of its bias, or is a DoRA."""
    name, generator = "diffusion_model.blocks.0.self_attn.q", torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    more = {"plain": {}, "biases": {"diff_b": draw(24)}, "DoRA": {"dora_scale": draw(24).abs() + 0.5}}[kind]
    parts = {"lora_down.weight": draw(4, 24), "lora_up.weight": draw(24, 4), **more}
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("plain", "biases", "adds to biases, for which 'x' has no place: load it without `hotswap`"),
        ("plain", "DoRA", "a DoRA cannot be swapped"),
        ("DoRA", "plain", "a DoRA cannot be swapped"),
        ("DoRA", "DoRA", "a DoRA cannot be swapped"),
        ("fused", "plain", r"a LoRA is fused into the weights: call unfuse_lora\(\) first"),
    ],
)
def test_what_cannot_be_swapped_leaves_the_lora_that_is_there(old, new, message, base):
    """peft would begin, fail, and take both away."""
    pipe = tiny_pipeline()
    pipe.load_lora_weights(of_a_kind("plain" if old == "fused" else old, 1), adapter_name="x")
    before = output(pipe.transformer)
    if old == "fused":
        pipe.fuse_lora()
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights(of_a_kind(new, 2), adapter_name="x", hotswap=True)
    assert close(pipe, before) and not close(pipe, base, 0.1)
    if old == "fused":
        pipe.unfuse_lora()
    pipe.disable_lora()
    assert close(pipe, base)


@pytest.mark.parametrize("new", ["plain", "biases"])
def test_swapping_where_there_are_biases(new):
    pipe, fresh = tiny_pipeline(), tiny_pipeline()
    pipe.load_lora_weights(of_a_kind("biases", 1), adapter_name="x")
    pipe.load_lora_weights(of_a_kind(new, 2), adapter_name="x", hotswap=True)
    fresh.load_lora_weights(of_a_kind(new, 2))
    assert close(pipe, output(fresh.transformer))


def test_digest_of_a_lora_that_was_swapped_in(tmp_path):
    """Of two that differ in alpha alone."""
    pipe, fresh = tiny_pipeline(), tiny_pipeline()
    pipe.load_lora_weights(of_one_module(tmp_path, 4, 2.0)[0], adapter_name="x")
    before = lora_digest(pipe.transformer, "x")
    path, _ = of_one_module(tmp_path, 4, 6.0)
    pipe.load_lora_weights(path, adapter_name="x", hotswap=True)
    fresh.load_lora_weights(path, adapter_name="x")
    assert lora_digest(fresh.transformer, "x") == lora_digest(pipe.transformer, "x") != before


def test_a_lora_of_a_higher_rank_is_swapped_in_in_half_precision(tmp_path):
    pipe = tiny_pipeline()
    pipe.transformer.to(torch.bfloat16)
    first, second = (of_one_module(tmp_path, rank, 2.0) for rank in (2, 4))
    pipe.load_lora_weights(first[0], adapter_name="x")
    pipe.load_lora_weights(second[0], adapter_name="x", hotswap=True)
    assert {parameter.dtype for parameter in pipe.transformer.parameters()} == {torch.bfloat16}
    fresh = tiny_pipeline()
    fresh.transformer.to(torch.bfloat16)
    fresh.load_lora_weights(second[0], adapter_name="x")
    latents, text = torch.ones(1, 4, 3, 8, 8).bfloat16(), torch.ones(1, 16, 32).bfloat16()
    with torch.no_grad():
        results = [p.transformer(latents, torch.full((1,), 700.0), text).sample for p in (pipe, fresh)]
    assert torch.equal(*results)


def adapted(names=("x",), **options):
    pipe = tiny_pipeline()
    torch.manual_seed(0)
    for name in names:
        config = LoraConfig(r=4, target_modules=["to_q", "ffn.net.2"], init_lora_weights=False, **options)
        pipe.transformer.add_adapter(config, name)
    return pipe


@pytest.mark.parametrize("save", ["pipeline", "transformer"])
def test_saving_a_fused_lora(save, loaded, files, tmp_path):
    """Plain weights, with the LoRA in them; the pipeline itself stays as it is."""
    loaded.fuse_lora()
    if save == "pipeline":
        loaded.save_pretrained(tmp_path)
    else:
        tiny_pipeline().save_pretrained(tmp_path)
        loaded.transformer.save_pretrained(tmp_path / "transformer")
    fresh = DiffusionPipeline.from_pretrained(tmp_path)
    assert fresh.transformer.state_dict().keys() == tiny_pipeline().transformer.state_dict().keys()
    assert close(fresh, expected(files, 1))
    loaded.unfuse_lora()
    loaded.unload_lora_weights()
    assert close(loaded, expected(files, 0))


def test_saving_with_a_lora_that_is_not_fused(loaded, files, base, tmp_path):
    line = "a LoRA is loaded.*fuse_lora.*unload_lora_weights"
    pipes = {"loaded": loaded, "trained": adapted(), "one of two": adapted(("x", "y"))}
    pipes["one of two"].set_adapters(["x", "y"])
    pipes["one of two"].fuse_lora(adapter_names=["x"])
    for name, pipe in pipes.items():
        with pytest.raises(ValueError, match=line):
            pipe.save_pretrained(tmp_path / name)
        assert not (tmp_path / name).exists()
        with pytest.raises(ValueError, match=line):
            pipe.transformer.save_pretrained(tmp_path / name)
    # What does not act is not missing.
    loaded.disable_lora()
    loaded.transformer.save_pretrained(tmp_path / "disabled")
    pipes["trained"].delete_adapters("x")
    pipes["trained"].transformer.save_pretrained(tmp_path / "deleted")
    for name in ("disabled", "deleted"):
        saved = type(loaded.transformer).from_pretrained(tmp_path / name)
        assert (output(saved) - base).abs().max() < 1e-5


def test_fused_projections(files, tmp_path):
    plain = files[3]
    pipe = tiny_pipeline()
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match="fused: call its unfuse_qkv_projections"):
        pipe.load_lora_weights(plain)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["attn2.to_v"], init_lora_weights=False))
    with pytest.raises(ValueError, match="they are fused: call unfuse_qkv_projections"):
        output(pipe.transformer)
    pipe.transformer.unfuse_qkv_projections()
    assert output(pipe.transformer).isfinite().all()
    with pytest.raises(ValueError, match="unload_lora_weights"):
        pipe.transformer.fuse_qkv_projections()
    # One that has nothing to do with it.
    other = tiny_pipeline()
    other.transformer.fuse_qkv_projections()
    lora = matrices(ranks={"blocks.0.ffn.0": (2, 2.0)})
    other.load_lora_weights(write(tmp_path / "ffn", str, "lora_A.weight", "lora_B.weight", lora, alpha=False))
    assert (output(other.transformer) - merged(lora)).abs().max() < 1e-5


def test_own_transformer(tmp_path):
    """A class of one's own, which has no place for whole differences."""
    from tests.own_transformer import OwnTransformer

    pipe = tiny_pipeline(transformer=OwnTransformer())
    lora = {"blocks.1.to_q.lora_A.weight": torch.ones(2, 8), "blocks.1.to_q.lora_B.weight": torch.ones(8, 2)}
    save_file(lora, tmp_path / "lora.safetensors")
    pipe.load_lora_weights(Path(tmp_path, "lora.safetensors"))
    assert pipe.transformer.blocks[1].to_q.r == {"default_0": 2}
    with pytest.raises(ValueError, match="changes blocks.7.to_q, which the transformer does not have"):
        pipe.load_lora_weights({key.replace("1", "7"): tensor for key, tensor in lora.items()})
