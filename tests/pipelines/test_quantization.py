"""8-bit layers by torchao: which they are, what is added to them, and where they end up."""

import sys

import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig, TorchAoConfig
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

from astrolabe_diffusers import CausalWanTransformer3DModel
from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.pipelines.loading import load_from, load_loras, weights_digest
from astrolabe_diffusers.pipelines.quantization import (
    NOT_QUANTIZED,
    QUANTIZATIONS,
    check_float8,
    quant_type,
    quantization_config,
)
from astrolabe_diffusers.training import NFTConfig, NFTTrainer
from astrolabe_diffusers.training.adapter_files import save_adapter
from tests.tiny_pipeline import SMALL, save_tiny_pipeline, tiny_pipeline


PROMPT = "a red circle moves left on a black background"
# A window that moves on soon; widths that products of 8 bits can have.
OVERRIDES = {**SMALL, "num_layers": 1, "local_attn_size": 3, "attention_head_dim": 16}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def torchao():
    return pytest.importorskip("torchao.quantization")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("pipeline"), **OVERRIDES)


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """Folders of two LoRAs that are seen."""
    folders = [tmp_path_factory.mktemp("lora") for _ in range(2)]
    for seed, folder in enumerate(folders):
        transformer = tiny_pipeline(**OVERRIDES).transformer
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS, init_lora_weights=False)
        transformer.add_adapter(config)
        save_adapter(transformer, folder, "default")
    return [str(folder) for folder in folders]


# float8's own products need a GPU; its weights with products of bfloat16 do not.
KINDS = {
    "int8_weight_only": lambda torchao: quant_type("int8_weight_only"),
    "float8 weights": lambda torchao: torchao.Float8WeightOnlyConfig(set_inductor_config=False),
}


@pytest.fixture(params=KINDS)
def quantized(request, folder, torchao):
    config = TorchAoConfig(KINDS[request.param](torchao), modules_to_not_convert=[*NOT_QUANTIZED])
    return load(folder, PipelineQuantizationConfig(quant_mapping={"transformer": config}))


def load(folder, quantization_config=None, dtype=torch.bfloat16):
    return load_from(str(folder), dtype=dtype, quantization_config=quantization_config)


def latents(pipe, **kwargs):
    generator = torch.Generator().manual_seed(0)
    return pipe(PROMPT, generator=generator, output_type="latent", num_frames=33, **kwargs).frames


def relative_error(result, expected):
    return ((result - expected).norm() / expected.norm()).item()


def linears(transformer):
    return {name: layer for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear)}


def dequantized(pipe, folder):
    """The same pipeline in bfloat16, whose weights are what the 8 bits stand for."""
    plain = load(folder)
    for name, layer in linears(plain.transformer).items():
        weight = pipe.transformer.get_submodule(name).weight
        layer.weight.data = weight.dequantize() if type(weight) is not nn.Parameter else weight.data
    return plain


def test_the_layers_are_the_blocks(folder, torchao):
    """As torchao quantises the blocks itself; all else is as it was. A weight moves by half a step at most, of the 127
    that its row has on either side of 0."""
    pipe, plain = load(folder, quantization_config("int8_weight_only", CPU)), load(folder)
    expected = load(folder)
    torchao.quantize_(expected.transformer.blocks, quant_type("int8_weight_only"))
    assert torch.equal(latents(pipe), latents(expected))
    names = []
    for name, parameter in pipe.transformer.named_parameters():
        before = plain.transformer.get_parameter(name)
        if type(parameter) is nn.Parameter:
            assert torch.equal(parameter, before) and parameter.dtype == before.dtype
            continue
        names.append(name)
        before = before.double()
        step = before.abs().amax(1, keepdim=True) / 127
        # Steps and products are bfloat16's.
        assert ((parameter.dequantize() - before).abs() <= 0.51 * step + 2**-7 * before.abs()).all()
    blocks = [f"blocks.{name}.weight" for name in linears(pipe.transformer.blocks)]
    assert names == blocks and len(names) == 10
    assert pipe.transformer.dtype == torch.bfloat16
    assert pipe.transformer.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32


def test_all_layers_as_diffusers_documents_it(folder, torchao):
    """By its own loader, those outside of the blocks too: all but what is kept in float32."""
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig(set_inductor_config=False))
    config = PipelineQuantizationConfig(quant_mapping={"transformer": config})
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
    pipe.set_progress_bar_config(disable=True)
    kept = {name for name, layer in linears(pipe.transformer).items() if type(layer.weight) is nn.Parameter}
    assert kept == {f"condition_embedder.time_embedder.linear_{i}" for i in (1, 2)}
    assert 0 < relative_error(latents(pipe), latents(load(folder))) < 0.05


def test_latents_are_those_of_the_rounded_weights(quantized, folder):
    result, plain = latents(quantized), latents(load(folder))
    rounding = relative_error(plain, latents(load(folder, dtype=torch.float32)))
    assert relative_error(result, latents(dequantized(quantized, folder))) < 2 * rounding
    assert 0 < relative_error(result, plain) < 0.05


def test_loras_lie_beside_the_weights(quantized, folder, loras):
    base, plain = latents(quantized), dequantized(quantized, folder)
    rounding = relative_error(latents(load(folder)), latents(load(folder, dtype=torch.float32)))
    for pipe in (quantized, plain):
        load_loras(pipe, dict(zip(loras, (0.7, 0.3))))
    both = latents(quantized)
    assert relative_error(both, base) > 20 * rounding
    assert relative_error(both, latents(plain)) < 3 * rounding
    for pipe in (quantized, plain):
        pipe.set_adapters("lora_1", 0.5)
    assert relative_error(latents(quantized), both) > 10 * rounding
    assert relative_error(latents(quantized), latents(plain)) < 3 * rounding
    assert torch.equal(latents(quantized, attention_kwargs={"scale": 0.0}), base)
    with pytest.raises(ValueError, match="^a LoRA cannot be fused into quantised weights: fuse it before"):
        quantized.fuse_lora()
    quantized.unload_lora_weights()
    assert torch.equal(latents(quantized), base)


def test_a_lora_of_biases_is_refused(folder, loras, tmp_path, torchao):
    state = load_file(f"{loras[0]}/pytorch_lora_weights.safetensors")
    state["transformer.blocks.0.attn1.to_q.diff_b"] = torch.ones(32)
    save_file(state, tmp_path / "lora.safetensors")
    load(folder).load_lora_weights(tmp_path / "lora.safetensors")
    pipe = load(folder, quantization_config("int8_weight_only", CPU))
    with pytest.raises(ValueError, match="^this LoRA adds to biases, which peft has no place for"):
        pipe.load_lora_weights(tmp_path / "lora.safetensors")


def test_saved_and_loaded(quantized, folder, loras, tmp_path):
    expected, digest = latents(quantized), weights_digest(quantized.transformer)
    assert digest != weights_digest(load(folder).transformer)
    quantized.save_pretrained(tmp_path / "plain")
    # What is there beside the weights is left out.
    quantized.load_lora_weights(loras[0])
    quantized.disable_lora()
    quantized.save_pretrained(tmp_path / "beside a LoRA")
    for name in ("plain", "beside a LoRA"):
        loaded = load(tmp_path / name)
        assert torch.equal(latents(loaded), expected)
        assert weights_digest(loaded.transformer) == digest
    with pytest.raises(UserError, match=r"was quantised in torch.bfloat16: load it in that, not in torch.float32\.$"):
        load(tmp_path / "plain", dtype=torch.float32)


def test_the_transformer_alone(folder, torchao):
    config = quantization_config("int8_weight_only", CPU).quant_mapping["transformer"]
    transformer = CausalWanTransformer3DModel.from_pretrained(
        folder, subfolder="transformer", quantization_config=config, dtype=torch.bfloat16
    )
    pipe = load(folder)
    pipe.transformer = transformer
    assert torch.equal(latents(pipe), latents(load(folder, quantization_config("int8_weight_only", CPU))))


def test_the_digest_follows_every_part(quantized):
    """Of 8-bit weights, the bits and the scales."""
    digests = {weights_digest(quantized.transformer)}
    weight = quantized.transformer.blocks[0].ffn.net[2].weight
    for part in ("qdata", "scale"):
        getattr(weight, part).view(torch.uint8)[0, 0] += 1
        digests.add(weights_digest(quantized.transformer))
    assert len(digests) == 3


def test_compiled(quantized):
    """The same latents, and longer videos and changes of the prompt find it all compiled."""
    expected = latents(quantized)
    torch._dynamo.reset()
    try:
        quantized.compile(backend="eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(latents(quantized), expected)
            with quantized.stream(PROMPT, num_frames=57) as stream:
                for block, _ in enumerate(stream):
                    if block == 1:
                        stream.set_prompt("a blue square moves up on a white background", "recache")
    finally:
        torch._dynamo.reset()


def test_offloaded_layer_by_layer(quantized, loras):
    quantized.load_lora_weights(loras[0])
    expected = latents(quantized)
    quantized.transformer.enable_group_offload(CPU, CPU, offload_type="leaf_level")
    assert torch.equal(latents(quantized), expected)


def test_training_wants_the_weights(quantized, tmp_path):
    config = NFTConfig(output_dir=str(tmp_path), rewards="sharpness=1", report_to="none")
    with pytest.raises(UserError, match="^the transformer is quantised: train with its own weights"):
        NFTTrainer(quantized, config, train_prompts=[PROMPT], eval_prompts=["a blue square"])


# What a user can get wrong


def test_devices_without_float8(monkeypatch):
    words = r"^quantization float8 needs a GPU of compute capability 8.9 or more .*: choose int8_weight_only, or none"
    with pytest.raises(UserError, match=words) as error:
        quantization_config("float8", CPU)
    assert "this is a CPU" in str(error.value)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    for capability in ((8, 0), (8, 6)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        with pytest.raises(UserError, match=words) as error:
            quantization_config("float8", torch.device("cuda"))
        assert f"this is NVIDIA A100, of {capability[0]}.{capability[1]}" in str(error.value)
    for capability in ((8, 9), (9, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        check_float8(torch.device("cuda"))


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_without_torchao(monkeypatch, quantization):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    words = rf"^quantization {quantization} needs torchao: pip install 'astrolabe_diffusers\[quantization\]'"
    with pytest.raises(UserError, match=words):
        quant_type(quantization)


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_on_a_gpu(folder, loras, torchao, quantization):
    """Compiled and not, with a LoRA and without, in memory and out of it: near the latents of the weights."""
    device = torch.device("cuda")
    plain = load(folder).to(device)
    pipe = load(folder, quantization_config(quantization, device))
    assert all(type(layer.weight) is not nn.Parameter for layer in linears(pipe.transformer.blocks).values())
    pipe.enable_group_offload(device, offload_type="leaf_level")
    assert 0 < relative_error(latents(pipe), latents(plain)) < 0.1
    pipe = load(folder, quantization_config(quantization, device)).to(device)
    for each in (pipe, plain):
        load_loras(each, {loras[0]: 0.7})
    expected = latents(plain)
    eager = latents(pipe)
    assert 0 < relative_error(eager, expected) < 0.1
    pipe.compile()
    assert relative_error(latents(pipe), expected) < 0.1


@pytest.mark.gpu
def test_a_token_of_zeros(torchao):
    """As padding of a prompt has them where the layers before have no biases."""
    layer = nn.Sequential(nn.Linear(64, 32)).to("cuda", torch.bfloat16)
    x = torch.randn(4, 64, device="cuda", dtype=torch.bfloat16)
    x[1] = 0
    expected = layer(x)
    torchao.quantize_(layer, quant_type("float8"))
    assert torch.equal(layer(x)[1], expected[1]) and relative_error(layer(x), expected) < 0.1
