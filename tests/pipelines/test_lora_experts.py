"""LoRAs of a pipeline with two experts: whose they are in files, and what they do to each."""

import json

import pytest
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from astrolabe_diffusers import CausalWanPipeline
from astrolabe_diffusers.layouts.lora_modules import load_original_loras
from astrolabe_diffusers.pipelines.loading import base_digest, lora_digest, weights_digest
from tests.pipelines.test_scenes import generate
from tests.tiny_pipeline import SMALL, tiny_pipeline
from tests.two_experts import PROMPT, WINDOWS, two_expert_pipeline


CHUNKWISE = {**SMALL, **WINDOWS["chunkwise"], "sigmas": [1.0, 0.5]}
RANK, ALPHA = 4, 8
BOTH = ("transformer", "memory_transformer")


def matrices(seed, layers=2):
    """A and B of two modules of each block, under diffusers' names."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"blocks.{i}.{module}" for i in range(layers) for module in ("attn1.to_k", "attn1.to_q")]
    draw = lambda *shape: 0.4 * torch.randn(shape, generator=generator)  # noqa: E731
    return {f"{n}.lora_{x}.weight": draw(*((RANK, 24) if x == "A" else (24, RANK))) for n in names for x in "AB"}


LORAS = {"transformer": matrices(1), "memory_transformer": matrices(2)}


def write(folder, *components, **loras):
    """A file of `save_lora_weights`."""
    config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["attn1.to_k", "attn1.to_q"], "peft_type": "LORA"}
    arguments = {f"{name}_lora_layers": (LORAS | loras)[name] for name in components}
    arguments |= {f"{name}_lora_adapter_metadata": dict(config) for name in components}
    CausalWanPipeline.save_lora_weights(folder, **arguments)
    return folder


def video(pipe):
    return generate(pipe, PROMPT, num_frames=45)


def merged(**weights):
    """The video of a pipeline whose experts have W + weight alpha / rank B A, written out."""
    pipe = two_expert_pipeline(**CHUNKWISE)
    for name, weight in weights.items():
        state = getattr(pipe, name).state_dict()
        for key, a in LORAS[name].items():
            if "lora_A" in key:
                b = LORAS[name][key.replace("lora_A", "lora_B")]
                state[key.replace("lora_A.", "")] += weight * ALPHA / RANK * b @ a
    return video(pipe)


@pytest.fixture(scope="module")
def videos():
    return {
        "none": merged(),
        "transformer": merged(transformer=1.0),
        "memory_transformer": merged(memory_transformer=1.0),
        "both": merged(transformer=1.0, memory_transformer=1.0),
        "halves": merged(transformer=0.5, memory_transformer=0.5),
        "uneven": merged(transformer=0.3, memory_transformer=2.0),
    }


@pytest.fixture
def pipe():
    return two_expert_pipeline(**CHUNKWISE)


def close(a, b):
    return (a - b).abs().max() <= 2e-5


def test_the_videos_differ(videos):
    for name, other in videos.items():
        assert all(name == n or (other - o).abs().max() > 1e-2 for n, o in videos.items())


def test_the_file_of_both(pipe, videos, tmp_path):
    write(tmp_path, *BOTH)
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert tensors.keys() == {f"{name}.{key}" for name in BOTH for key in LORAS[name]}
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        header = json.loads(file.metadata()[LORA_ADAPTER_METADATA_KEY])
    assert header["transformer.lora_alpha"] == header["memory_transformer.lora_alpha"] == ALPHA
    pipe.load_lora_weights(tmp_path)
    assert pipe.get_list_adapters() == {"transformer": ["default_0"], "memory_transformer": ["default_0"]}
    assert close(video(pipe), videos["both"])
    for name in BOTH:
        config = getattr(pipe, name).peft_config["default_0"]
        assert (config.r, config.lora_alpha, config.target_modules) == (RANK, ALPHA, {"attn1.to_k", "attn1.to_q"})


@pytest.mark.parametrize("component", BOTH)
def test_the_file_of_one(pipe, videos, component, tmp_path):
    pipe.load_lora_weights(write(tmp_path, component), adapter_name="one")
    assert pipe.get_list_adapters() == {component: ["one"]}
    assert close(video(pipe), videos[component])


def test_a_file_that_names_no_component(pipe, videos, tmp_path):
    """As diffusers has it with `load_into_transformer_2`: the same kind of file for either."""
    for name in BOTH:
        bare = {key: 2 * tensor if "lora_B" in key else tensor for key, tensor in LORAS[name].items()}
        save_file(bare, tmp_path / f"{name}.safetensors")
    pipe.load_lora_weights(tmp_path / "transformer.safetensors", adapter_name="style")
    assert close(video(pipe), videos["transformer"])
    memory = tmp_path / "memory_transformer.safetensors"
    pipe.load_lora_weights(memory, adapter_name="style", load_into_memory_transformer=True)
    assert close(video(pipe), videos["both"])
    other = two_expert_pipeline(**CHUNKWISE)
    other.load_lora_weights(load_file(memory), load_into_memory_transformer=True)
    assert close(video(other), videos["memory_transformer"])
    # A file that says it needs no telling.
    again = two_expert_pipeline(**CHUNKWISE)
    again.load_lora_weights(write(tmp_path / "said", "memory_transformer"), load_into_memory_transformer=True)
    assert close(video(again), videos["memory_transformer"])


def test_weights_disabling_fusing_and_unloading(pipe, videos, tmp_path):
    pipe.load_lora_weights(write(tmp_path, *BOTH), adapter_name="a")
    pipe.set_adapters("a", 0.5)
    assert close(video(pipe), videos["halves"])
    pipe.set_adapters("a", {"transformer": 0.3, "memory_transformer": 2.0})
    assert close(video(pipe), videos["uneven"])
    pipe.disable_lora()
    assert close(video(pipe), videos["none"])
    pipe.enable_lora()
    pipe.set_adapters("a", 1.0)
    scaled = generate(pipe, PROMPT, num_frames=45, attention_kwargs={"scale": 0.5})
    assert close(scaled, videos["halves"]) and close(video(pipe), videos["both"])
    with pytest.raises(ValueError, match="fuse_lora.. saves the two as one"):
        pipe.save_pretrained(tmp_path / "model")
    pipe.fuse_lora()
    pipe.save_pretrained(tmp_path / "model")
    assert close(video(CausalWanPipeline.from_pretrained(tmp_path / "model")), videos["both"])
    pipe.unfuse_lora(components=["memory_transformer"])
    pipe.disable_lora()
    pipe.unfuse_lora()
    assert close(video(pipe), videos["none"])
    pipe.enable_lora()
    pipe.fuse_lora(["memory_transformer"])
    pipe.unload_lora_weights()
    assert close(video(pipe), videos["memory_transformer"])


def test_two_loras_of_which_each_is_one_expert_s(pipe, videos, tmp_path):
    for name in BOTH:
        pipe.load_lora_weights(write(tmp_path / name, name), adapter_name=name)
    pipe.set_adapters(list(BOTH), [0.3, 2.0])
    assert close(video(pipe), videos["uneven"])
    pipe.set_adapters("memory_transformer")
    assert close(video(pipe), videos["memory_transformer"])
    pipe.set_adapters("transformer")
    pipe.delete_adapters("memory_transformer")
    assert close(video(pipe), videos["transformer"])
    assert pipe.get_list_adapters()["transformer"] == ["transformer"]


def test_all_of_it_or_nothing(pipe, videos, tmp_path):
    loras = {"memory_transformer": matrices(2, layers=3)}
    with pytest.raises(ValueError, match="this LoRA changes blocks.2.attn1.to_k"):
        pipe.load_lora_weights(write(tmp_path, *BOTH, **loras))
    assert pipe.get_list_adapters() == {} and torch.equal(video(pipe), videos["none"])
    # A name that only the second expert has.
    pipe.load_lora_weights(write(tmp_path / "second", "memory_transformer"), adapter_name="a")
    with pytest.raises(ValueError, match="there is a LoRA 'a' already"):
        pipe.load_lora_weights(write(tmp_path / "both", *BOTH), adapter_name="a")
    assert pipe.get_list_adapters() == {"memory_transformer": ["a"]}


def test_hotswap(pipe, videos, tmp_path):
    """Of both experts or of one: the same ones as before."""
    other = {name: {key: -0.5 * tensor for key, tensor in LORAS[name].items()} for name in BOTH}
    pipe.load_lora_weights(write(tmp_path / "other", *BOTH, **other), adapter_name="a")
    before = video(pipe)
    for name in BOTH:
        line = f"'a' is of transformer and memory_transformer, this LoRA of {name}"
        with pytest.raises(ValueError, match=line):
            pipe.load_lora_weights(write(tmp_path / name, name), adapter_name="a", hotswap=True)
    # The second half does not fit: nothing of it is swapped.
    wider = {"memory_transformer": matrices(2) | {"proj_out.lora_A.weight": torch.ones(RANK, 24)}}
    wider["memory_transformer"]["proj_out.lora_B.weight"] = torch.ones(16, RANK)
    with pytest.raises(ValueError, match="changes proj_out, 1 such modules in all, where 'a' has no layer"):
        pipe.load_lora_weights(write(tmp_path / "wider", *BOTH, **wider), adapter_name="a", hotswap=True)
    assert torch.equal(video(pipe), before) and not close(before, videos["both"])
    pipe.load_lora_weights(write(tmp_path, *BOTH), adapter_name="a", hotswap=True)
    assert close(video(pipe), videos["both"])
    single = two_expert_pipeline(**CHUNKWISE)
    single.load_lora_weights(write(tmp_path / "one", "memory_transformer", **other), adapter_name="b")
    for arguments, line in (({"adapter_name": "b"}, "'b' is of memory_transformer, this"), ({}, "is of none, this")):
        with pytest.raises(ValueError, match=f"{line} LoRA of transformer and memory_transformer"):
            single.load_lora_weights(tmp_path, hotswap=True, **arguments)
    single.load_lora_weights(tmp_path / "memory_transformer", adapter_name="b", hotswap=True)
    assert close(video(single), videos["memory_transformer"])


def test_what_a_user_gets_wrong(pipe, tmp_path):
    write(tmp_path, *BOTH)
    with pytest.raises(ValueError, match="leave out `load_into_memory_transformer`"):
        pipe.load_lora_weights(tmp_path, load_into_memory_transformer=True)
    plain = tiny_pipeline(**CHUNKWISE)
    for arguments in ({}, {"adapter_name": "a"}):
        with pytest.raises(ValueError, match="is for memory_transformer, which this pipeline does not have"):
            plain.load_lora_weights(tmp_path, **arguments)
    assert plain.get_list_adapters() == {}
    with pytest.raises(ValueError, match="nothing to save"):
        CausalWanPipeline.save_lora_weights(tmp_path)
    pipe.load_lora_weights(tmp_path, adapter_name="a")
    with pytest.raises(ValueError, match="there is a LoRA 'a' already"):
        pipe.load_lora_weights(tmp_path, adapter_name="a")
    with pytest.raises(TypeError, match="no argument 'load_into_transformer_2'"):
        pipe.load_lora_weights(tmp_path, load_into_transformer_2=True)


def test_what_is_read(tmp_path):
    found = load_original_loras(write(tmp_path, *BOTH))
    assert found.keys() == set(BOTH)
    for name, lora in found.items():
        assert torch.equal(lora.modules["blocks.1.attn1.to_q"].a, LORAS[name]["blocks.1.attn1.to_q.lora_A.weight"])
        assert lora.modules["blocks.1.attn1.to_q"].scale == ALPHA / RANK


def test_digests(pipe, tmp_path):
    """Each tells of both experts, and does not depend on the other's LoRA."""
    base, whole = base_digest(pipe), weights_digest(pipe.denoiser)
    pipe.load_lora_weights(write(tmp_path, *BOTH), adapter_name="a")
    digest = lora_digest(pipe.denoiser, "a")
    assert base_digest(pipe) == base and weights_digest(pipe.denoiser) != whole
    for name in BOTH:
        other = two_expert_pipeline(**CHUNKWISE)
        first, *_ = LORAS[name]
        changed = LORAS[name] | {first: 1 + LORAS[name][first]}
        other.load_lora_weights(write(tmp_path / name, *BOTH, **{name: changed}), adapter_name="a")
        assert lora_digest(other.denoiser, "a") != digest
        with torch.no_grad():
            getattr(other, name).proj_out.bias[0] += 1
        assert base_digest(other) != base
