"""Two experts in one checkpoint, by the names of Self Gradient Forcing+."""

import pytest
import torch
from accelerate import init_empty_weights

from astrolabe_diffusers import CausalWanTransformer3DModel
from astrolabe_diffusers.layouts.experts import split_checkpoint, split_lora
from astrolabe_diffusers.layouts.published_models import PUBLISHED_MODELS
from astrolabe_diffusers.layouts.wan_checkpoints import check_fits, load_original_experts, load_original_weights
from tests.layouts.original_layout import original_names, original_weights
from tests.tiny_pipeline import tiny_transformer


# Written down from the published code, and not by a rule.
IN_ATTENTION = ("q.memory_weight", "q.memory_bias", "k.memory_weight", "k.memory_bias", "v.memory_weight")
IN_ATTENTION += ("v.memory_bias", "o.memory_weight", "o.memory_bias", "norm_q.memory_weight", "norm_k.memory_weight")
IN_BLOCK = (*(f"self_attn.{name}" for name in IN_ATTENTION), *(f"cross_attn.{name}" for name in IN_ATTENTION))
IN_BLOCK += ("norm3.memory_weight", "norm3.memory_bias", "ffn.0.memory_weight", "ffn.0.memory_bias")
IN_BLOCK += ("ffn.2.memory_weight", "ffn.2.memory_bias", "memory_modulation")
MODULES = ("patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2")
MODULES += ("time_projection.1", "head.head")
OUTSIDE = ["memory_head.modulation", *(f"memory_{name}.{end}" for name in MODULES for end in ("weight", "bias"))]


def memory_names(num_layers):
    return [*OUTSIDE, *(f"blocks.{i}.{name}" for i in range(num_layers) for name in IN_BLOCK)]


def plain(name):
    before, after = name.split("memory_")
    return before + after


def two_experts(first, second):
    """A checkpoint of both: tensors by their published names."""
    weights, memory = original_weights(first), original_weights(second)
    names = memory_names(first.config.num_layers)
    assert {plain(name) for name in names} == memory.keys()
    return weights | {name: memory[plain(name)] for name in names}


@pytest.mark.parametrize("prefix", ["", "model.", "model._fsdp_wrapped_module."])
def test_full_size(prefix):
    with init_empty_weights():
        shapes = CausalWanTransformer3DModel(num_attention_heads=12, num_layers=30, ffn_dim=8960).state_dict()
    names = original_names(30)
    tensors = {prefix + old: shapes[new] for old, new in names.items()}
    tensors |= {prefix + name: shapes[names[plain(name)]] for name in memory_names(30)}
    assert len(tensors) == 2 * 825
    experts = load_original_experts({"generator_ema": tensors}, recipe=PUBLISHED_MODELS["sgf-plus-chunkwise"])
    assert list(experts) == ["transformer", "memory_transformer"]
    for original in experts.values():
        assert len(original.tensors) == 825
        check_fits(original.tensors, {name: tensor.shape for name, tensor in shapes.items()})


def test_every_tensor_is_its_own_expert_s():
    first, second = tiny_transformer(), tiny_transformer(seed=1)
    experts = load_original_experts({"generator": two_experts(first, second)})
    for original, transformer in zip(experts.values(), (first, second), strict=True):
        state = transformer.state_dict()
        assert original.tensors.keys() == state.keys()
        assert all(torch.equal(original.value(name), tensor) for name, tensor in state.items())


def test_a_checkpoint_of_one_model_has_no_second():
    assert list(load_original_experts(original_weights(tiny_transformer()))) == ["transformer"]


def test_a_file_of_both_is_no_single_transformer():
    checkpoint = two_experts(tiny_transformer(), tiny_transformer(seed=1))
    message = "holds two transformers.*`astrolabe convert` makes a pipeline of both"
    with pytest.raises(ValueError, match=message):
        CausalWanTransformer3DModel.from_single_file(checkpoint)
    with pytest.raises(ValueError, match=message):
        load_original_weights({"generator": checkpoint})


def test_names_of_components_in_a_lora():
    assert split_lora({"transformer.a": 1, "memory_transformer.a": 2, "b": 3}) == {
        "transformer": {"transformer.a": 1, "b": 3},
        "memory_transformer": {"a": 2},
    }
    assert split_lora({"memory_transformer.a": 1}) == {"memory_transformer": {"a": 1}}
    assert split_lora({}) == {"transformer": {}}
    # The mark goes once.
    assert split_checkpoint({"memory_head.memory_x": 1}) == {"memory_transformer": {"head.memory_x": 1}}
