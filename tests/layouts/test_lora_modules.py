"""Every layout of a LoRA, beside weights that are merged by hand."""

import functools
import json
import math

import pytest
import torch
from accelerate import init_empty_weights
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from astrolabe_diffusers import CausalWanPipeline, CausalWanTransformer3DModel
from astrolabe_diffusers.conversion.config import ConversionConfig
from astrolabe_diffusers.conversion.convert import convert
from astrolabe_diffusers.layouts.lora_modules import load_original_loras, parse_lora
from tests.layouts.original_layout import original_names
from tests.tiny_pipeline import tiny_pipeline, tiny_transformer


NAMES = {name.removesuffix(".weight"): new for name, new in original_names(2).items() if name.endswith(".weight")}
# Original module: rank and alpha. Only some blocks, only some modules, no two alike.
RANKS = {
    "blocks.1.self_attn.q": (4, 2.0),
    "blocks.1.self_attn.o": (2, 3.0),
    "blocks.0.cross_attn.v": (4, 4.0),
    "blocks.1.ffn.0": (3, 1.5),
    "blocks.1.ffn.2": (4, 8.0),
    "text_embedding.2": (2, 2.0),
    "time_embedding.0": (4, 1.0),
    "time_projection.1": (4, 2.0),
    "head.head": (1, 0.5),
}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(vae_num_res_blocks=0)


@pytest.fixture
def fresh(pipe):
    """Makes pipelines without a LoRA: what loading one does not change, they share."""
    return lambda: CausalWanPipeline(**{**pipe.components, "transformer": tiny_transformer()})


@torch.no_grad()
def output(transformer, **kwargs):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 3, 8, 8, generator=generator)
    text = torch.randn(1, 16, 32, generator=generator)
    return transformer(latents, torch.full((1,), 700.0), text, **kwargs).sample


@functools.cache
def shapes():
    return {name: tensor.shape for name, tensor in tiny_transformer().state_dict().items()}


def matrices(dtype=torch.float32, ranks=RANKS):
    """A, B and alpha of each original module."""
    generator, result = torch.Generator().manual_seed(1), {}
    for module, (rank, alpha) in ranks.items():
        rows, columns = shapes()[NAMES[module]]
        a, b = (torch.randn(shape, generator=generator) * 0.25 for shape in ((rank, columns), (rows, rank)))
        result[module] = a.to(dtype), b.to(dtype), alpha
    return result


@torch.no_grad()
def merged(lora, scale=lambda rank, alpha: alpha / rank, additions=()):
    """W + scale B A, and whole additions by original name, written out."""
    transformer = tiny_transformer()
    weights, originals = transformer.state_dict(), original_names(2)
    for module, (a, b, alpha) in lora.items():
        weights[NAMES[module]] += scale(a.shape[0], alpha) * b.float() @ a.float()
    for name, tensor in dict(additions).items():
        weights[originals[name]] += tensor
    return output(transformer)


def write(path, module_format, a, b, lora, alpha=True):
    tensors = {}
    for module, (matrix_a, matrix_b, value) in lora.items():
        name = module_format(module)
        tensors |= {f"{name}.{a}": matrix_a, f"{name}.{b}": matrix_b}
        if alpha:
            tensors[f"{name}.alpha"] = torch.tensor(value, dtype=matrix_a.dtype if matrix_a.itemsize > 1 else None)
    save_file(tensors, path)
    return path


def flat(prefix, names=lambda module: module):
    return lambda module: prefix + names(module).replace(".", "_")


def dotted(prefix, names=lambda module: module):
    return lambda module: prefix + names(module)


def diffusers(module):
    return NAMES[module].removesuffix(".weight")


PEFT, KOHYA = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
DIFFSYNTH = ("lora_A.default.weight", "lora_B.default.weight")
# How the name of a module is written, those of A and B, and whether there are alphas.
LAYOUTS = {
    "kohya, musubi": (flat("lora_unet_"), *KOHYA, True),
    "kohya with diffusers' names": (flat("lora_transformer_", diffusers), *KOHYA, True),
    "LyCORIS": (flat("lycoris_"), *KOHYA, True),
    "ComfyUI": (dotted("diffusion_model."), *KOHYA, True),
    "ComfyUI, ai-toolkit, diffusion-pipe": (dotted("diffusion_model."), *PEFT, False),
    "DiffSynth": (dotted(""), *DIFFSYNTH, False),
    "DiffSynth with its pipeline's names": (dotted("pipe.dit."), *DIFFSYNTH, False),
    "peft without a config": (dotted("base_model.model."), *PEFT, False),
    "FSDP": (dotted("base_model.model.model._fsdp_wrapped_module."), *PEFT, False),
    "diffusers": (dotted("transformer.", diffusers), *PEFT, False),
    "diffusers before peft": (dotted("transformer.", diffusers), "lora.down.weight", "lora.up.weight", False),
    "diffusers, of the transformer alone": (dotted("", diffusers), *PEFT, False),
}


def check(path, expected, tmp_path, fresh):
    """Loaded, converted and loaded, saved again and loaded, and merged: always the weights merged by hand."""
    loaded = fresh()
    assert (expected - output(loaded.transformer)).abs().max() > 0.05
    loaded.load_lora_weights(str(path))
    assert (output(loaded.transformer) - expected).abs().max() < 1e-5
    assert not any(parameter.is_meta for parameter in loaded.transformer.parameters())

    convert(ConversionConfig(lora=path, output_dir=tmp_path / "converted"))
    loaded.transformer.save_lora_adapter(tmp_path / "saved", adapter_name="default_0")
    for folder in ("converted", "saved"):
        again = fresh()
        again.load_lora_weights(tmp_path / folder)
        assert (output(again.transformer) - expected).abs().max() < 1e-5

    lora, transformer = load_original_loras(path)["transformer"], tiny_transformer()
    weights = {name: lora.merge(name, tensor) for name, tensor in transformer.state_dict().items()}
    transformer.load_state_dict(weights)
    assert (output(transformer) - expected).abs().max() < 1e-5


@functools.cache
def merged_in_a_layout(alpha):
    return merged(matrices()) if alpha else merged(matrices(), lambda rank, alpha: 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout, fresh, tmp_path):
    name, a, b, alpha = LAYOUTS[layout]
    path = write(tmp_path / "lora.safetensors", name, a, b, matrices(), alpha)
    check(path, merged_in_a_layout(alpha), tmp_path, fresh)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_fewer_bits(dtype, fresh, tmp_path):
    lora = matrices(dtype)
    path = write(tmp_path / "lora.safetensors", dotted("diffusion_model."), *KOHYA, lora)
    check(path, merged(lora), tmp_path, fresh)


def test_every_linear_layer_of_a_published_model():
    """RAVEN's of Wan2.1 1.3B: 306 modules, six of them outside of the blocks, none of which takes memory here."""
    with init_empty_weights():
        transformer = CausalWanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30)
    weights, tensors, number = transformer.state_dict(), {}, torch.ones(1, 1)
    for original, name in original_names(30).items():
        if original.endswith(".weight") and weights[name].ndim == 2:
            module, (rows, columns) = original.removesuffix(".weight"), weights[name].shape
            tensors[f"base_model.model.{module}.lora_A.weight"] = number.expand(256, columns)
            tensors[f"base_model.model.{module}.lora_B.weight"] = number.expand(rows, 256)
    lora = parse_lora(tensors)
    lora.check_fits(weights)
    linears = {name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(tensors) == 2 * 306 and lora.modules.keys() == linears and not lora.diffs
    assert {(module.rank, module.scale) for module in lora.modules.values()} == {(256, 1.0)}
    with init_empty_weights():
        transformer.add_adapter(lora.peft_config())
    adapted = {name for name, p in transformer.named_parameters() if ".lora_A." in name and p.shape[0] == 256}
    assert adapted == {f"{name}.lora_A.default.weight" for name in linears}
    # Between the two layers of the text's embedding there is none.
    other = {f"base_model.model.text_embedding.1.lora_{x}.weight": number for x in "AB"}
    with pytest.raises(ValueError, match="changes text_embedding.1, which Wan2.1 1.3B .* does not have"):
        parse_lora(other).check_fits(weights)


def test_config_beside_the_file(fresh, tmp_path):
    """peft's folder in the original's names: rsLoRA, ranks and alphas of single modules."""
    lora = matrices()
    write(tmp_path / "adapter_model.safetensors", dotted("base_model.model."), *PEFT, lora, alpha=False)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 3, "use_rslora": True}
    config["rank_pattern"] = {m: rank for m, (rank, _) in RANKS.items() if rank != 4}
    config["alpha_pattern"] = {"self_attn.q": 5.0, "head.head": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    lora = {module: (a, b, 3) for module, (a, b, _) in lora.items()}
    lora["blocks.1.self_attn.q"] = (*lora["blocks.1.self_attn.q"][:2], 5.0)
    lora["head.head"] = (*lora["head.head"][:2], 2)
    check(tmp_path, merged(lora, lambda rank, alpha: alpha / math.sqrt(rank)), tmp_path, fresh)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"to_k": 64}, "rank_pattern": {"attn2.to_q": 2}},
        {"alpha_pattern": {r"^blocks\.0\.attn1\.to_q": 64}, "rank_pattern": {"^blocks.1.attn2.to_q": 2}},
        {"alpha_pattern": {"^blocks.0.attn1.to_q": 64}, "rank_pattern": {"^proj_out": 2}, "use_rslora": True},
        {"use_dora": True},
        {"lora_bias": True},
    ],
    ids=str,
)
def test_what_peft_saves(options, fresh, tmp_path):
    """peft's own model is the reference."""
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["to_q", "to_k", "proj_out"]} | options
    config = LoraConfig(init_lora_weights=False, **options)
    model = get_peft_model(tiny_transformer(), config).eval()
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= torch.rand_like(parameter) + 0.5
    model.save_pretrained(tmp_path)
    check(tmp_path, output(model), tmp_path, fresh)


def test_what_diffusers_saves_with_anchored_patterns(fresh, tmp_path):
    """peft's layers are the reference; in the file, and in its config's names, `transformer.` goes before."""
    torch.manual_seed(0)
    trained = fresh().transformer
    patterns = {"alpha_pattern": {r"^blocks\.0\.attn1\.to_q": 32}, "rank_pattern": {"^blocks.1.attn1.to_q": 2}}
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q"], init_lora_weights=False, **patterns)
    trained.add_adapter(config, "x")
    CausalWanPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(trained, adapter_name="x"),
        transformer_lora_adapter_metadata=config.to_dict(),
    )
    check(tmp_path, output(trained), tmp_path, fresh)


def test_a_pattern_that_names_what_the_trainer_had_around_the_model(fresh, tmp_path):
    """As it would be for a Wan in a module of its trainer's, `model`."""

    class Wrapper(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

    torch.manual_seed(0)
    alphas = {"^model.blocks.0.attn1.to_q": 64}
    config = LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False, alpha_pattern=alphas)
    model = get_peft_model(Wrapper(tiny_transformer()), config).eval()
    model.save_pretrained(tmp_path)
    check(tmp_path, output(model.base_model.model.model), tmp_path, fresh)


def test_dora_of_kohya(fresh, tmp_path):
    """`dora_scale`, `(out, 1)`: lengths of the rows of W + scale B A, written out."""
    lora = matrices(ranks={"blocks.1.self_attn.q": (4, 2.0), "blocks.0.ffn.0": (2, 2.0)})
    path = write(tmp_path / "lora.safetensors", flat("lora_unet_"), *KOHYA, lora)
    tensors, transformer = load_file(path), tiny_transformer()
    with torch.no_grad():
        for module, (a, b, alpha) in lora.items():
            weight = transformer.get_parameter(NAMES[module])
            length = torch.rand(len(weight), 1) + 1
            tensors[f"lora_unet_{module.replace('.', '_')}.dora_scale"] = length
            changed = weight + alpha / len(a) * b @ a
            weight.copy_(length * changed / (changed**2).sum(1, keepdim=True).sqrt())
    save_file(tensors, path)
    check(path, output(transformer), tmp_path, fresh)


def test_longlive_s_file(fresh, tmp_path):
    lora = matrices()
    tensors = load_file(write(tmp_path / "flat.safetensors", dotted("base_model.model."), *PEFT, lora, alpha=False))
    torch.save({"generator_lora": tensors, "critic_lora": {}, "step": 3}, tmp_path / "lora.pt")
    check(tmp_path / "lora.pt", merged(lora, lambda rank, alpha: 1), tmp_path, fresh)


def additions():
    """Whole differences of everything that a distilled model's LoRA holds."""
    generator = torch.Generator().manual_seed(2)
    names = [
        *("patch_embedding.weight", "patch_embedding.bias", "head.head.weight", "head.head.bias", "head.modulation"),
        *("blocks.0.norm3.weight", "blocks.0.norm3.bias", "blocks.1.self_attn.norm_q.weight", "blocks.1.modulation"),
        *("blocks.0.cross_attn.norm_k.weight", "blocks.1.self_attn.q.bias", "text_embedding.0.bias"),
        *("blocks.1.ffn.0.weight", "time_projection.1.bias"),
    ]
    originals = original_names(2)
    return {name: 0.2 * torch.randn(shapes()[originals[name]], generator=generator) for name in names}


def difference_key(name):
    module, _, kind = name.rpartition(".")
    return f"{module}.{ {'weight': 'diff', 'bias': 'diff_b', 'modulation': 'diff_m'}[kind] }"


def distilled(tmp_path, alpha=True):
    """As lightx2v and CausVid publish it: A and B, and differences, some of them zero."""
    lora, whole = matrices(), additions()
    path = write(tmp_path / "distilled.safetensors", dotted("diffusion_model."), *KOHYA, lora, alpha)
    tensors = load_file(path) | {f"diffusion_model.{difference_key(name)}": tensor for name, tensor in whole.items()}
    tensors["diffusion_model.blocks.0.self_attn.norm_q.diff"] = torch.zeros(24)
    save_file(tensors, path)
    return path, lora, whole


def test_differences(fresh, tmp_path):
    path, lora, whole = distilled(tmp_path)
    check(path, merged(lora, additions=whole), tmp_path, fresh)


@pytest.mark.parametrize("name", additions())
def test_single_difference(name, fresh, tmp_path):
    """Nothing of it is a LoRA's own, whichever it is."""
    addition = {name: additions()[name]}
    path = tmp_path / "lora.safetensors"
    save_file({f"diffusion_model.{difference_key(name)}": addition[name]}, path)
    loaded = fresh()
    before = output(loaded.transformer)
    loaded.load_lora_weights(path)
    expected = merged({}, additions=addition)
    assert (output(loaded.transformer) - expected).abs().max() < 1e-5
    assert (expected - before).abs().max() > 1e-3


def test_alpha_of_a_file_that_does_not_say_it(fresh, tmp_path):
    lora = matrices(ranks={"blocks.0.self_attn.q": (4, 10.0)})
    path = write(tmp_path / "lora.safetensors", dotted("base_model.model."), *PEFT, lora, alpha=False)
    for alpha, scale in ((None, 1), (10, 2.5)):
        convert(ConversionConfig(lora=path, output_dir=tmp_path / "converted", overwrite=True, lora_alpha=alpha))
        loaded = fresh()
        loaded.load_lora_weights(tmp_path / "converted")
        assert (output(loaded.transformer) - merged(lora, lambda *_: scale)).abs().max() < 1e-5
    said = write(tmp_path / "said.safetensors", dotted("diffusion_model."), *KOHYA, lora)
    with pytest.raises(ValueError, match="says its alpha itself"):
        convert(ConversionConfig(lora=said, output_dir=tmp_path / "again", lora_alpha=10))


Q = "diffusion_model.blocks.0.self_attn.q"
PAIR = {f"{Q}.lora_A.weight": torch.ones(4, 24), f"{Q}.lora_B.weight": torch.ones(24, 4)}
FLAT = "lora_unet_blocks_0_self_attn_q"
REFUSED = {
    "half of a module": ({f"{Q}.lora_A.weight": torch.ones(4, 24)}, "blocks.0.attn1.to_q has A but no B"),
    "the other half": ({f"{Q}.lora_up.weight": torch.ones(24, 4)}, "blocks.0.attn1.to_q has B but no A"),
    "ranks": (PAIR | {f"{Q}.lora_B.weight": torch.ones(24, 5)}, r"A is \(4, 24\) and B \(24, 5\)"),
    "alpha alone": (PAIR | {"diffusion_model.head.head.alpha": torch.ones(())}, "proj_out has alpha but no A and B"),
    "NaN": (PAIR | {f"{Q}.lora_A.weight": torch.full((4, 24), torch.nan)}, f"{Q}.lora_A.weight holds NaN"),
    "NaN in a difference": (PAIR | {f"{Q}.diff_b": torch.full((24,), torch.inf)}, f"{Q}.diff_b holds NaN"),
    "whole weights": (PAIR | {f"{Q}.bias": torch.ones(24)}, f"it holds {Q}.bias"),
    "another part": (PAIR | {"lora_te1_layers_0.alpha": torch.ones(())}, "changes lora_te1_layers_0|has alpha"),
    "image to video": (
        {f"diffusion_model.blocks.0.cross_attn.k_img.lora_{x}.weight": t for x, t in zip("AB", PAIR.values())},
        "blocks.0.cross_attn.k_img, which .* does not have: it is of an image-to-video model",
    ),
    "a block that is not there": (
        {key.replace("blocks.0", "blocks.7"): t for key, t in PAIR.items()},
        "changes blocks.7.attn1.to_q, which a Wan transformer of width 24, 2 layers does not have",
    ),
    "another width": (PAIR | {f"{Q}.lora_A.weight": torch.ones(4, 30)}, "another model's: at blocks.0.attn1.to_q"),
    "another norm": (
        PAIR | {"diffusion_model.blocks.0.norm3.diff": torch.ones(9)},
        "another model's: at blocks.0.norm2",
    ),
    "twice": (
        PAIR | {"blocks.0.self_attn.q.lora_down.weight": torch.ones(4, 24)},
        "two tensors for A of blocks.0.attn1",
    ),
    "LoKr": ({f"{FLAT}.lokr_w1": torch.ones(2, 2), f"{FLAT}.alpha": torch.ones(())}, "is a LoKr, not a LoRA"),
    "LoHa": ({f"{FLAT}.hada_w1_a": torch.ones(2, 2)}, "is a LoHa, not a LoRA"),
    "DoRA by columns": (
        PAIR | {f"{Q}.dora_scale": torch.ones(1, 24)},
        r"dora_scale at blocks.0.attn1.to_q is \(1, 24\)",
    ),
    "DoRA and not": (
        PAIR | {f"{Q}.dora_scale": torch.ones(24, 1), "blocks.0.ffn.0.diff_b": torch.ones(32)},
        "mixes DoRA with other changes",
    ),
    "numbers": (PAIR | {f"{Q}.diff_b": torch.ones(24, dtype=torch.int8)}, "of int8, which is no weight"),
    "nothing": ({}, "is no LoRA: it is empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case, pipe):
    tensors, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as error:
        pipe.load_lora_weights(tensors)
    assert "\n" not in str(error.value) and len(str(error.value)) < 250
    assert not any("lora" in name or parameter.is_meta for name, parameter in pipe.transformer.named_parameters())
    assert not hasattr(pipe.transformer, "peft_config")


CONFIGS = {
    "alpha is text": ({"lora_alpha": "sixteen"}, "lora_alpha of its config has to be a number but is 'sixteen'"),
    "alpha of a module": ({"alpha_pattern": {"q": None}}, "alpha_pattern q of its config has to be a number"),
    "a pattern": ({"rank_pattern": [4]}, "rank_pattern of its config has to be a dict"),
    "nonsense rank": ({"r": 10**9}, "does not fit its own config: rank 1000000000 there, 4 at blocks.0.attn1.to_q"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha of its config has to be a number"),
    "another adapter": ({"peft_type": "LOHA"}, "is a LOHA adapter of peft, not a LoRA"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the base weights"),
    "a variant": ({"use_qalora": True}, "variant of LoRA that is not read: use_qalora"),
    "DoRA without lengths": ({"use_dora": True}, "has no lora_magnitude_vector"),
}


@pytest.mark.parametrize("place", ["adapter_config.json", "header"])
@pytest.mark.parametrize("case", CONFIGS)
def test_config_that_is_refused(case, place, pipe, tmp_path):
    change, message = CONFIGS[case]
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4} | change
    header = {"format": "pt"}
    if place == "header":
        header[LORA_ADAPTER_METADATA_KEY] = json.dumps({f"transformer.{name}": x for name, x in config.items()})
    else:
        (tmp_path / place).write_text(json.dumps(config))
    save_file(PAIR, tmp_path / "adapter_model.safetensors", metadata=header)
    with pytest.raises(ValueError, match=message) as error:
        pipe.load_lora_weights(tmp_path)
    assert "\n" not in str(error.value)


def test_config_without_alpha_and_broken_ones(pipe, tmp_path):
    save_file(PAIR, tmp_path / "adapter_model.safetensors")
    for text, message in (
        ('{"peft_type": "LORA", "r": 4}', "config without lora_alpha"),
        ("[1]", "is no dict"),
        ("{", "is no JSON"),
    ):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            pipe.load_lora_weights(tmp_path)


def test_which_file_of_a_folder(pipe, tmp_path):
    lora = tmp_path / "lora"
    lora.mkdir()
    with pytest.raises(ValueError, match="holds no LoRA"):
        load_original_loras(lora)
    save_file(PAIR, lora / "one.safetensors")
    (lora / "README.md").write_text("a LoRA")
    assert load_original_loras(lora)["transformer"].modules.keys() == {"blocks.0.attn1.to_q"}
    save_file({}, lora / "two.safetensors")
    with pytest.raises(ValueError, match="several files, one.safetensors, two.safetensors: .*weight_name"):
        load_original_loras(lora)
    assert CausalWanPipeline.lora_state_dict(lora, weight_name="one.safetensors")
    save_file(PAIR, lora / "pytorch_lora_weights.safetensors")
    assert load_original_loras(lora)["transformer"].modules
    assert CausalWanPipeline.lora_state_dict(tmp_path, subfolder="lora")
    with pytest.raises(FileNotFoundError, match="no such file"):
        pipe.load_lora_weights(str(lora / "three.safetensors"))
    with pytest.raises(TypeError, match="weigth_name"):
        pipe.load_lora_weights(lora, weigth_name="one.safetensors")


def test_a_dict_is_not_changed_by_what_is_done_with_the_lora(fresh):
    tensors = {key: tensor.clone() for key, tensor in PAIR.items()}
    loaded = fresh()
    loaded.load_lora_weights(tensors)
    for parameter in loaded.transformer.parameters():
        parameter.data.zero_()
    assert tensors.keys() == PAIR.keys() and all(torch.equal(tensors[key], PAIR[key]) for key in PAIR)
    assert parse_lora(tensors).modules["blocks.0.attn1.to_q"].rank == 4


def test_hub_repository_in_the_cache(tmp_path):
    """peft's file and its config, found by the repository's list of files; in a subfolder and by name too."""
    repo = tmp_path / "models--me--lora"
    snapshot = repo / "snapshots" / ("0" * 40)
    (snapshot / "sub").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    for folder, alpha in ((snapshot, 8), (snapshot / "sub", 2)):
        save_file(PAIR, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": alpha}))
    cached = {"cache_dir": str(tmp_path), "local_files_only": True, "return_lora_metadata": True}
    for options, alpha in (
        ({}, 8),
        ({"weight_name": "adapter_model.safetensors"}, 8),
        ({"subfolder": "sub"}, 2),
        ({"subfolder": "sub", "weight_name": "adapter_model.safetensors"}, 2),
    ):
        state_dict, metadata = CausalWanPipeline.lora_state_dict("me/lora", **options, **cached)
        assert len(state_dict) == 2 and metadata["transformer.lora_alpha"] == alpha
    save_file(PAIR, snapshot / "other.safetensors")
    assert len(CausalWanPipeline.lora_state_dict("me/lora", weight_name="other.safetensors", **cached)) == 2
    with pytest.raises(OSError):
        CausalWanPipeline.lora_state_dict("me/nothing", **cached)
