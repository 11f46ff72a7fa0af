"""Gradients of two experts, of which one writes the cache, against plain autograd through the slow reference."""

import pytest
import torch
from accelerate import Accelerator

from astrolabe_diffusers.training.awm import AWMConfig
from astrolabe_diffusers.training.awm.trainer import AWMBatch, accumulate_gradients
from astrolabe_diffusers.training.nft.trainer import accumulate_gradients as accumulate_nft_gradients
from astrolabe_diffusers.training.policies import add_policies, policy_parameters, use_policy
from tests.processes import Torchrun
from tests.tiny_pipeline import tiny_pipeline
from tests.training.helpers import BRIGHTNESS, config, noised_batch, randomize_adapters
from tests.two_experts import WINDOWS, ReferenceExperts, two_expert_pipeline


BOTH = ("transformer", "memory_transformer")
ADVANTAGES = torch.tensor([1.5, -0.7])
RANK, ALPHA = 4, 8


def policy_pair(components, copy=False, window="chunkwise"):
    pipe = two_expert_pipeline(copy, **WINDOWS[window])
    torch.manual_seed(0)
    add_policies(pipe.denoiser, RANK, ALPHA, components=components)
    for expert in pipe.experts.values():
        randomize_adapters(expert)
    return pipe


def awm_batch(pipe, blocks=6):
    batch = noised_batch(pipe, frames=blocks * pipe.transformer.config.num_frames_per_block)
    names = ("clean", "noisy", "sigma", "timestep", "prompt_embeds", "pipeline")
    shared = {name: getattr(batch, name) for name in names}
    return AWMBatch(**shared, advantages=ADVANTAGES)


def awm(context, **values):
    return AWMConfig(**{"rewards": {BRIGHTNESS: 1.0}, "kl_weight": 0.0, "context": context, **values})


def gradients(model, batch, cfg, accumulate=accumulate_gradients):
    """By name, of the current policy."""
    model.zero_grad()
    accumulate(Accelerator(mixed_precision="no"), model, batch, cfg, len(batch.clean), True)
    return {name: p.grad for name, p in model.named_parameters() if ".default." in name}


def slow_gradients(pipe, batch, detach):
    """The loss of AWM written down, through the slow reference with W + alpha / rank B A for its weights."""
    leaves, weights = {}, []
    for component in BOTH:
        state, lora = {}, {}
        for name, tensor in getattr(pipe, component).named_parameters():
            tensor = tensor.detach().double()
            if ".default." in name:
                lora[name] = leaves[f"{component}.{name}"] = tensor.requires_grad_()
            elif ".lora_" not in name:
                state[name.replace(".base_layer.", ".")] = tensor
        for name, a in lora.items():
            if "lora_A" in name:
                b = lora[name.replace("lora_A", "lora_B")]
                module = name.removesuffix(".lora_A.default.weight")
                state[f"{module}.weight"] = state[f"{module}.weight"] + ALPHA / RANK * b @ a
        weights.append(state)
    slow = ReferenceExperts(*weights, dict(pipe.transformer.config))
    flow = slow.teacher_forcing(batch.noisy, batch.clean, batch.timestep, batch.prompt_embeds, detach)
    sigma = batch.sigma.double().view(-1, 1, 1, 1, 1)
    error = (batch.noisy - sigma * flow - batch.clean) / sigma
    (batch.advantages * error.square().mean(dim=(1, 2, 3, 4))).mean().backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


def assert_same(result, expected):
    assert result.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values() if gradient is not None)
    assert largest > 1e-3
    for name, gradient in expected.items():
        found = torch.zeros_like(gradient) if result[name] is None else result[name].to(gradient.dtype)
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-5 * largest.item())


def filled(gradients, like):
    return {name: torch.zeros_like(like[name]) if g is None else g for name, g in gradients.items()}


WITH_PASSES = [*((name, 2) for name in WINDOWS), ("chunkwise", 1), ("framewise", 7)]


@pytest.mark.parametrize("window,blocks_per_pass", WITH_PASSES)
def test_what_is_stored_is_a_constant(window, blocks_per_pass):
    """As by default: only the expert that denoises learns, from the other's context."""
    pipe = policy_pair(["transformer"], window=window)
    batch = awm_batch(pipe)
    result = gradients(pipe.denoiser, batch, awm("clean", blocks_per_pass=blocks_per_pass))
    assert_same(result, slow_gradients(pipe, batch, detach=True))


@pytest.mark.parametrize(
    "window,components,checkpointing",
    [
        ("unlimited", BOTH, False),
        ("framewise", BOTH, False),
        ("chunkwise", BOTH, False),
        ("chunkwise", BOTH, True),
        ("chunkwise", ["transformer"], False),
        ("chunkwise", ["memory_transformer"], False),
    ],
)
def test_gradients_through_what_is_stored(window, components, checkpointing):
    pipe = policy_pair(components, window=window)
    batch = awm_batch(pipe, blocks=5)
    expected = slow_gradients(pipe, batch, detach=False)
    if checkpointing:
        for expert in pipe.experts.values():
            expert.enable_gradient_checkpointing()
    names = dict(pipe.denoiser.named_parameters())
    result = gradients(pipe.denoiser, batch, awm("clean_grad"))
    assert_same(result, filled(expected, names))
    # What the memory expert's last layer does beyond its keys and values, nobody sees.
    blind = {name.split(".lora_")[0] for name, gradient in expected.items() if gradient is None}
    last = "memory_transformer.blocks.1."
    assert all(name.startswith(last) for name in blind)
    if "memory_transformer" in components:
        seen = {name.split(".lora_")[0] for name in result if name.startswith(last)} - blind
        assert seen == {f"{last}attn1.to_k", f"{last}attn1.to_v"}


@pytest.mark.parametrize("accumulate", ["awm", "nft"])
@pytest.mark.parametrize("context", ["clean", "clean_grad"])
def test_two_copies_have_the_gradients_of_one_model(context, accumulate):
    """Those of clean go into one expert; with gradients through the context the two add up, by the chain rule."""
    components = BOTH if context == "clean_grad" else ["transformer"]
    pair, plain = policy_pair(BOTH, copy=True), tiny_pipeline(**WINDOWS["chunkwise"])
    torch.manual_seed(0)
    add_policies(plain.transformer, RANK, ALPHA)
    randomize_adapters(plain.transformer)
    states = plain.transformer.state_dict()
    pair.transformer.load_state_dict(states), pair.memory_transformer.load_state_dict(states)
    if accumulate == "awm":
        batch, cfg, run = awm_batch(plain), awm(context, kl_weight=0.3), accumulate_gradients
    else:
        batch, cfg, run = noised_batch(plain, frames=18), config(context=context), accumulate_nft_gradients
    expected = gradients(plain.transformer, batch, cfg, run)
    both = gradients(pair.denoiser, batch, cfg, run)
    parts = {name: [both[f"{part}.{name}"] for part in components] for name in expected}
    assert_same({name: sum(g for g in found if g is not None) for name, found in parts.items()}, expected)
    memory = [gradient for name, gradient in both.items() if name.startswith("memory_transformer.")]
    assert any(g is not None and g.abs().max() > 1e-4 for g in memory) == (context == "clean_grad")


def test_context_with_gradients_of_one_model_is_plain_teacher_forcing():
    pipe = tiny_pipeline(**WINDOWS["absolute"])
    add_policies(pipe.transformer, RANK, ALPHA)
    randomize_adapters(pipe.transformer)
    batch, transformer = awm_batch(pipe), pipe.transformer
    result = gradients(transformer, batch, awm("clean_grad"))
    transformer.zero_grad()
    flow = transformer(batch.noisy, batch.timestep, batch.prompt_embeds, clean_hidden_states=batch.clean).sample
    sigma = batch.sigma.view(-1, 1, 1, 1, 1)
    target = (batch.noisy - batch.clean) / sigma
    (batch.advantages * (flow - target).square().mean(dim=(1, 2, 3, 4))).mean().backward()
    expected = {name: p.grad for name, p in transformer.named_parameters() if ".default." in name}
    assert_same(result, expected)
    # It is not what stops at the context.
    stopped = gradients(transformer, batch, awm("clean"))
    assert max((stopped[name] - gradient).abs().max() for name, gradient in expected.items()) > 1e-3


def test_policies_of_both_experts():
    """Each policy is both experts' LoRAs, and the base is neither's."""
    pipe = policy_pair(BOTH)
    inputs = awm_batch(pipe)
    arguments = inputs.noisy, inputs.timestep, inputs.prompt_embeds
    flows = {}
    for policy in ("current", "old", "base"):
        with use_policy(pipe.denoiser, policy):
            flows[policy] = pipe.denoiser(*arguments, clean_hidden_states=inputs.clean, return_dict=False)[0]
        with use_policy(pipe.denoiser, policy, merge=True):
            merged = pipe.denoiser(*arguments, clean_hidden_states=inputs.clean, return_dict=False)[0]
        assert (merged - flows[policy]).abs().max() <= 2e-5
    base = two_expert_pipeline(**WINDOWS["chunkwise"]).denoiser
    with torch.no_grad():
        plain = base(*arguments, clean_hidden_states=inputs.clean, return_dict=False)[0]
    assert torch.equal(flows["base"], plain)
    assert (flows["current"] - flows["old"]).abs().max() > 1e-2
    assert {p.requires_grad for p in policy_parameters(pipe.denoiser)} == {True}


def test_two_processes(tmp_path):
    """Gradients of both experts, of which some parameters have none, averaged over the processes."""
    code, output = Torchrun("tests/training/forward_process/experts_worker.py", tmp_path).finish()
    assert code == 0, output
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    pipe = policy_pair(BOTH)
    expected = gradients(pipe.denoiser, awm_batch(pipe), awm("clean_grad"))
    for result in ranks:
        assert_same(result, filled(expected, dict(pipe.denoiser.named_parameters())))
