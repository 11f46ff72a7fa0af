"""Merged policies beside the unmerged ones, and the weights afterwards."""

import copy

import pytest
import torch
from peft import LoraConfig
from torch import nn

from astrolabe_diffusers.training.checkpoints import policy_identity
from astrolabe_diffusers.training.merging import round_stochastically, rounding_noise
from astrolabe_diffusers.training.policies import (
    CURRENT,
    add_policies,
    follow_current,
    load_policies,
    policy_parameters,
    use_policy,
)
from tests.tiny_pipeline import tiny_pipeline, tiny_transformer
from tests.training.test_policies import forward, lora_of_another_trainer, trainable


POLICIES = ("current", "old", "reference", "ema")


def randomize(transformer, scale=0.1):
    generator = torch.Generator().manual_seed(1)
    for adapter in transformer.peft_config:
        for parameter in policy_parameters(transformer, adapter):
            parameter.data.add_(scale * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def transformer():
    """Four adapters that differ, with alpha twice the rank."""
    model = tiny_transformer()
    torch.manual_seed(0)
    add_policies(model, rank=4, lora_alpha=8, target_modules=["all-linear"], others=POLICIES[1:])
    randomize(model)
    return model


def cast_base(model, dtype):
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            parameter.data = parameter.data.to(dtype)


def outputs(model, merge):
    result = {}
    for policy in (*POLICIES, "base"):
        with use_policy(model, policy, merge):
            result[policy] = forward(model)
    return result


def assert_merging_changes_nothing(model):
    """But that it is what is called: with the adapters off."""
    merged, unmerged = outputs(model, True), outputs(model, False)
    for policy in merged:
        torch.testing.assert_close(merged[policy], unmerged[policy], rtol=1e-5, atol=1e-5)
        assert policy == "base" or (merged[policy] - merged["base"]).abs().max() > 1e-2
    with use_policy(model, "current", merge=True):
        for adapter in model.peft_config:
            for parameter in policy_parameters(model, adapter):
                parameter.data.mul_(2)
        assert torch.equal(forward(model), merged["current"])


def test_merged_policies_predict_what_unmerged_ones_do(transformer):
    assert_merging_changes_nothing(transformer)


def test_a_lora_with_ranks_biases_and_other_layers_of_its_own(tmp_path):
    """Ranks and alphas of single modules, biases, and a difference of the patch embedding, which is a convolution."""
    path, _ = lora_of_another_trainer(tmp_path)
    pipe = tiny_pipeline()
    load_policies(pipe, path, POLICIES[1:])
    randomize(pipe.transformer)
    layers = [module for module in pipe.transformer.modules() if hasattr(module, "lora_bias")]
    assert {type(layer.get_base_layer()) for layer in layers} == {nn.Linear, nn.Conv3d}
    assert len({layer.scaling[CURRENT] for layer in layers}) > 1 and any(layer.lora_bias[CURRENT] for layer in layers)
    assert_merging_changes_nothing(pipe.transformer)


def test_rank_stabilised_lora(tmp_path):
    pipe = tiny_pipeline()
    pipe.transformer.add_adapter(LoraConfig(r=9, lora_alpha=6, use_rslora=True, target_modules=["to_q", "to_v"]))
    pipe.transformer.save_lora_adapter(tmp_path)
    pipe.transformer.delete_adapters("default")
    pipe = tiny_pipeline()
    load_policies(pipe, tmp_path, POLICIES[1:])
    assert pipe.transformer.blocks[0].attn1.to_q.scaling == dict.fromkeys(("default", *POLICIES[1:]), 2.0)
    randomize(pipe.transformer, 0.5)
    assert_merging_changes_nothing(pipe.transformer)


def snapshot(model):
    return {name: (parameter, parameter.data_ptr(), parameter.clone()) for name, parameter in model.named_parameters()}


def assert_as_before(model, before):
    for name, parameter in model.named_parameters():
        was, address, value = before[name]
        assert parameter is was and parameter.data_ptr() == address and torch.equal(parameter, value), name
    assert model.active_adapters() == ["default"] and not model.blocks[0].attn1.to_q.disable_adapters
    assert trainable(model) == {name for name in before if ".default." in name}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_themselves_again(transformer, dtype):
    cast_base(transformer, dtype)
    before, identity = snapshot(transformer), policy_identity(transformer)
    weight = transformer.blocks[0].attn1.to_q.base_layer.weight
    own = weight.clone()
    for policy in POLICIES:
        with use_policy(transformer, policy, merge=True):
            assert weight.dtype == dtype and not torch.equal(weight, own)
        assert_as_before(transformer, before)
    with pytest.raises(RuntimeError, match="inside"), use_policy(transformer, "old", merge=True):
        raise RuntimeError("inside")
    assert_as_before(transformer, before)
    assert policy_identity(transformer) == identity


def test_weights_are_themselves_again_after_half_a_merge(transformer):
    broken = transformer.blocks[1].attn2.to_k.lora_B["old"]
    broken.weight.data = broken.weight.data[:, :1]
    before = snapshot(transformer)
    with pytest.raises(RuntimeError, match="shapes"), use_policy(transformer, "old", merge=True):
        pass
    assert_as_before(transformer, before)


def test_a_change_of_the_adapter_is_seen(transformer):
    first = outputs(transformer, True)
    follow_current(transformer, "old", 0.5)
    second = outputs(transformer, True)
    assert (second["old"] - first["old"]).abs().max() > 1e-2
    torch.testing.assert_close(second["old"], outputs(transformer, False)["old"], rtol=1e-5, atol=1e-5)
    assert all(torch.equal(second[policy], first[policy]) for policy in first if policy != "old")


def test_gradients_do_not_know_of_it(transformer):
    other = copy.deepcopy(transformer)
    outputs(transformer, True)
    for model in (transformer, other):
        forward(model).square().mean().backward()
    pairs = list(zip(policy_parameters(transformer), policy_parameters(other), strict=True))
    assert all(torch.equal(parameter.grad, expected.grad) for parameter, expected in pairs)
    assert all(expected.grad.any() for _, expected in pairs)


def test_no_random_number_of_the_run_s_is_drawn_and_none_matters(transformer):
    cast_base(transformer, torch.bfloat16)
    results = []
    for seed in (4, 5):
        state = torch.manual_seed(seed).get_state()
        with use_policy(transformer, "old", merge=True):
            results.append(transformer.blocks[0].ffn.net[2].base_layer.weight.clone())
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*results)


def test_a_young_lora_is_not_lost_in_bfloat16():
    """Changes of 0.02 % of a weight, which rounding to the nearest value takes for none."""
    model = tiny_transformer(ffn_dim=512)
    torch.manual_seed(0)
    add_policies(model, rank=4, lora_alpha=8)
    cast_base(model, torch.bfloat16)
    layers = {n: module for n, module in model.named_modules() if hasattr(module, "lora_A") and module.lora_A}
    own = {n: layer.base_layer.weight.clone() for n, layer in layers.items()}
    with use_policy(model, "current", merge=True):
        assert all(torch.equal(layer.base_layer.weight, own[n]) for n, layer in layers.items())  # B is zero
    changes = {}
    for n, layer in layers.items():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        B.data.normal_()
        B.data.mul_(2e-4 * own[n].float().std() / (2 * B @ A).std())
        changes[n] = (2 * B.double() @ A.double()).detach()
    with use_policy(model, "current", merge=True):
        merged = {n: layer.base_layer.weight.double() for n, layer in layers.items()}

    def kept(weights):
        """The part of the changes that the weights have."""
        products = sum(((weights[n] - own[n].double()) * changes[n]).sum() for n in changes)
        return products / sum(change.square().sum() for change in changes.values())

    assert kept(merged) == pytest.approx(1, abs=0.15)
    assert kept({n: (own[n].double() + changes[n]).bfloat16().double() for n in changes}) < 0.3
    # Each is one of the two values around it.
    for n in changes:
        assert ((merged[n] - own[n].double() - changes[n]).abs() <= own[n].double().abs() * 2**-7 + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_mean_of_what_is_rounded_is_exact(dtype, sign):
    low, step, number = 0.75, torch.finfo(dtype).eps / 2, 40_000
    for part in (0.0, 0.01, 0.3, 0.9):
        x = torch.full((number,), sign * (low + part * step))
        noise = rounding_noise(x.shape, dtype, torch.Generator().manual_seed(0))
        rounded = round_stochastically(x, dtype, noise)
        assert rounded.dtype == dtype
        up = (rounded.double() - sign * low) / (sign * step)
        assert set(up.tolist()) <= {0.0, 1.0}
        deviation = (part * (1 - part) / number) ** 0.5
        assert up.mean().item() == pytest.approx(part, abs=5 * deviation + 1e-3)  # the last bits of x itself


def test_what_cannot_be_rounded_stays():
    nan = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800000, -1, 0], dtype=torch.int32).view(torch.float32)
    noise = rounding_noise(nan.shape, torch.bfloat16, torch.Generator())
    rounded = round_stochastically(nan, torch.bfloat16, noise)
    assert rounded[[0, 1, 3]].isnan().all() and rounded[2] == torch.inf and rounded[4] == 0
