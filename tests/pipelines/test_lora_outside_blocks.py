"""A LoRA of every Linear layer, as RAVEN's: those outside of the blocks too, where text and time are embedded."""

import itertools

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, set_peft_model_state_dict

from astrolabe_diffusers import CausalWanKVCache, CausalWanPipeline
from tests.layouts.test_lora_modules import NAMES, PEFT, dotted, matrices, merged, output, shapes, write
from tests.models.test_reference_causal_wan import stock_wan
from tests.models.test_transformer_causal_wan import MODEL_ONLY
from tests.tiny_pipeline import SMALL, tiny_pipeline, tiny_transformer


RANK = 3
PROMPT = "a red circle moves left on a black background"
# A block of one frame in two steps.
FRAMES = {**SMALL, "num_frames_per_block": 1, "sigmas": (1.0, 0.5)}


def lora(modules=lambda module: True):
    """A, B and alpha of the Linear layers of these original names."""
    linears = [module for module, name in NAMES.items() if len(shapes()[name]) == 2]
    return matrices(ranks={module: (RANK, float(RANK)) for module in linears if modules(module)})


def in_blocks(module):
    return module.startswith("blocks.")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """As RAVEN's: peft's names and no config, the scale 1."""
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    return write(path, dotted("base_model.model."), *PEFT, lora(), alpha=False)


def weights_by_hand(scale):
    weights = tiny_transformer(num_frames_per_block=1).state_dict()
    for module, (a, b, _) in lora().items():
        weights[NAMES[module]] += scale * b @ a
    return weights


@pytest.mark.parametrize("scale", [1.0, 0.4, -0.7])
def test_against_diffusers_and_peft(file, scale):
    """A video of one block, in which every frame sees every other as in the stock model."""
    pipe = tiny_pipeline(**SMALL)
    pipe.load_lora_weights(file, adapter_name="x")
    assert len([n for n, _ in pipe.transformer.named_parameters() if ".lora_A." in n]) == len(lora()) == 2 * 10 + 6
    pipe.set_adapters("x", scale)
    plain = tiny_transformer()
    config = {name: value for name, value in plain.config.items() if name not in (*MODEL_ONLY, "_name_or_path")}
    stock = stock_wan(config, plain.state_dict())
    names = {module: NAMES[module].removesuffix(".weight") for module in lora()}
    stock.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(names.values())), "x")
    tensors = {
        f"{names[module]}.lora_{which}.weight": matrix
        for module, pair in lora().items()
        for which, matrix in zip("AB", pair)
    }
    assert not set_peft_model_state_dict(stock, tensors, "x").unexpected_keys
    stock.set_adapters("x", scale)
    difference = (output(pipe.transformer) - output(stock)).abs().max()
    assert difference < 1e-5 and (output(stock) - output(plain)).abs().max() > 0.1


def test_half_precision(file, tmp_path):
    """diffusers keeps the time embedder in float32, and so is what a LoRA adds to it."""
    tiny_pipeline(**SMALL).save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    pipe.load_lora_weights(file)
    pipe.set_adapters("default_0", 0.25)
    dtypes = {name: p.dtype for name, p in pipe.transformer.named_parameters() if ".lora_" in name}
    assert {name for name, dtype in dtypes.items() if dtype != torch.bfloat16} == {
        name for name in dtypes if ".time_embedder." in name
    }
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 4, 3, 8, 8, generator=generator), torch.randn(1, 16, 32, generator=generator)
    with torch.no_grad():
        result = pipe.transformer(latents.bfloat16(), torch.full((1,), 700.0), text.bfloat16()).sample
    expected = merged({module: (a, b, 0.25 * RANK) for module, (a, b, _) in lora().items()})
    error = (result.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 0.05


def swap(pipe, file):
    """For its own negative."""
    tensors = CausalWanPipeline.lora_state_dict(file)
    negative = {key: -tensor if ".lora_B." in key else tensor for key, tensor in tensors.items()}
    pipe.load_lora_weights(negative, adapter_name="x", hotswap=True)


# What a user does while a stream runs, and the weight that the LoRA then has.
SWITCHES = {
    "weight": (lambda pipe, file: pipe.set_adapters("x", 0.5), 0.5),
    "off": (lambda pipe, file: pipe.disable_lora(), 0.0),
    "fused": (lambda pipe, file: pipe.fuse_lora(), 1.0),
    "unloaded": (lambda pipe, file: pipe.unload_lora_weights(), 0.0),
    "swapped": (swap, -1.0),
}


def stream(pipe, change, within):
    """Latents of six blocks of two steps; before the fourth block, or in the middle of it, there is a change."""
    steps = itertools.count()

    def on_step_end(*_):
        if next(steps) == 6:
            change()

    arguments = {"num_frames": 21, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    blocks = []
    with pipe.stream(PROMPT, **arguments, callback_on_step_end=on_step_end if within else None) as blocks_to_come:
        for block in blocks_to_come:
            blocks.append(block)
            if len(blocks) == 3 and not within:
                change()
    return torch.cat(blocks, dim=2)


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("within", [False, True], ids=["between blocks", "between steps"])
def test_a_stream_in_which_it_is_switched(file, switch, within, monkeypatch):
    """As weights that are written over by hand at the same moment, where no text is kept."""
    act, scale = SWITCHES[switch]
    pipe, by_hand = tiny_pipeline(**FRAMES), tiny_pipeline(**FRAMES)
    pipe.load_lora_weights(file, adapter_name="x")
    result = stream(pipe, lambda: act(pipe, file), within)
    monkeypatch.setattr(CausalWanKVCache, "set_text", lambda *_: None)
    by_hand.transformer.load_state_dict(weights_by_hand(1.0))
    unchanged = stream(by_hand, lambda: None, within)
    expected = stream(by_hand, lambda: by_hand.transformer.load_state_dict(weights_by_hand(scale)), within)
    assert (result - expected).abs().max() < 1e-4
    differs = (unchanged - expected).abs().amax(dim=(0, 1, 3, 4)) > 0.01
    assert differs.tolist() == [False] * 3 + [scale != 1] * 3


def test_swapping_one_of_the_blocks_in_and_out(file, tmp_path):
    """What the new one does not change is the model's; where it changes more, it is told in one line."""
    blocks = write(tmp_path / "blocks", dotted("base_model.model."), *PEFT, lora(in_blocks), alpha=False)
    pipe = tiny_pipeline(**SMALL)
    pipe.load_lora_weights(file, adapter_name="x")
    pipe.load_lora_weights(blocks, adapter_name="x", hotswap=True)
    assert (output(pipe.transformer) - merged(lora(in_blocks))).abs().max() < 1e-5
    pipe.load_lora_weights(file, adapter_name="x", hotswap=True)
    assert (output(pipe.transformer) - merged(lora())).abs().max() < 1e-5
    pipe = tiny_pipeline(**SMALL)
    pipe.load_lora_weights(blocks, adapter_name="x")
    with pytest.raises(ValueError, match="changes condition_embedder.*, 6 such modules.*'x' has no layer.*without"):
        pipe.load_lora_weights(file, adapter_name="x", hotswap=True)
    assert (output(pipe.transformer) - merged(lora(in_blocks))).abs().max() < 1e-5


def test_swapping_beside_one_of_a_longer_name(file):
    """peft would empty it without a word."""
    pipe = tiny_pipeline(**SMALL)
    for name in ("style", "style_2"):
        pipe.load_lora_weights(file, adapter_name=name)
    with pytest.raises(ValueError, match="peft would empty .*style_2.*, for 'style' is in its name"):
        pipe.load_lora_weights(file, adapter_name="style", hotswap=True)
    pipe.load_lora_weights(file, adapter_name="style_2", hotswap=True)
    pipe.set_adapters(["style", "style_2"], [0.25, 0.75])
    assert (output(pipe.transformer) - merged(lora())).abs().max() < 1e-5
