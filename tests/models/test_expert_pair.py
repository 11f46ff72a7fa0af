"""Two experts that share a cache, against the slow way and against one model in both places."""

import pytest
import torch

from astrolabe_diffusers.models.expert_pair import ExpertPair, differences
from astrolabe_diffusers.models.kv_cache_clip import ClipKVCache
from tests.tiny_pipeline import tiny_transformer
from tests.two_experts import WINDOWS, ReferenceExperts


def clip(num_frames, batch_size=2):
    generator = torch.Generator().manual_seed(0)
    clean, noisy = torch.randn(2, batch_size, 4, num_frames, 4, 4, generator=generator)
    timestep = torch.tensor([937.5, 625.0])[:batch_size]
    return clean, noisy, timestep, torch.randn(batch_size, 16, 32, generator=generator)


def pair_of(window, memory_seed=1):
    return ExpertPair(*(tiny_transformer(seed, **WINDOWS[window]) for seed in (0, memory_seed)))


def teacher_forcing(transformer, num_frames):
    clean, noisy, timestep, text = clip(num_frames)
    return transformer(noisy, timestep, text, clean_hidden_states=clean, return_dict=False)[0]


def gradients(model, num_frames):
    model.zero_grad()
    teacher_forcing(model, num_frames).square().sum().backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def test_what_two_experts_must_have_in_common():
    transformer = tiny_transformer()
    assert not list(differences(transformer, tiny_transformer(seed=1)))
    found = list(differences(transformer, tiny_transformer(sink_size=1, local_attn_size=8)))
    assert found == ["`local_attn_size` is 8 and not -1", "`sink_size` is 1 and not 0"]
    window = {"local_attn_size": 6, "sink_size": 1, "rope_mode": "relative"}
    for value in ({"rope_window": 9}, {"sink_ema": 0.9}):
        assert len(list(differences(tiny_transformer(**window), tiny_transformer(**window, **value)))) == 1
    bank = tiny_transformer(local_attn_size=6, memory_bank_size=2)
    assert list(differences(bank, bank)) == [
        "a memory bank is chosen by the text's keys of one transformer, not of two"
    ]
    assert list(differences(transformer, tiny_transformer().to(torch.bfloat16))) == [
        "its dtype is torch.bfloat16 and not torch.float32"
    ]


@pytest.mark.parametrize("window", WINDOWS)
def test_blocks_with_a_cache(window):
    """Every noisy block after the window has moved, and the text that each expert keeps for itself."""
    pair = pair_of(window)
    n = pair.config.num_frames_per_block
    clean, noisy, timestep, text = clip(7 * n)
    weights = (expert.state_dict() for expert in pair.children())
    slow = ReferenceExperts(*weights, dict(pair.config))
    expected = slow.teacher_forcing(noisy, clean, timestep, text, detach=True)
    cache, flows = pair.new_kv_cache(7 * n), []
    cache.set_text(text)
    with torch.no_grad():
        for start in range(0, 7 * n, n):
            block = slice(start, start + n)
            arguments = {"kv_cache": cache, "frame_offset": start, "return_dict": False}
            # Twice: with the text's keys and values new, and kept.
            for _ in range(2):
                flow = pair(noisy[:, :, block], timestep, text, kv_cache_mode="read", **arguments)[0]
                assert (flow - expected[:, :, block]).abs().max() <= 1e-5
            flows.append(flow)
            pair(clean[:, :, block], torch.zeros(2), text, kv_cache_mode="write", **arguments)
    assert (torch.cat(flows, dim=2) - teacher_forcing(pair, 7 * n)).abs().max() <= 1e-5
    # Neither expert does the other's work, nor the work of both.
    for other in (ExpertPair(*reversed(list(pair.children()))), pair.transformer, pair.memory_transformer):
        assert (teacher_forcing(other, 7 * n) - expected)[:, :, n:].abs().max() > 1e-2


def test_each_expert_projects_a_text_once():
    pair, projected = pair_of("chunkwise"), []
    for name, expert in pair.named_children():
        expert.blocks[0].attn2.to_k.register_forward_hook(lambda *_, name=name: projected.append(name))
    clean, noisy, timestep, text = clip(3)
    cache = pair.new_kv_cache()
    for _ in range(2):
        projected.clear()
        cache.set_text(text)
        with torch.no_grad():
            for mode in ("read", "write", "read", "write", "read"):
                latents, t = (noisy, timestep) if mode == "read" else (clean, torch.zeros(2))
                pair(latents, t, text, kv_cache=cache, kv_cache_mode=mode, frame_offset=cache.num_frames)
        assert projected == ["transformer", "memory_transformer"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
def test_gradients_of_two_copies_add_up_to_those_of_one_model(window, checkpointing):
    """The chain rule for a weight that is used in two places. The one model is teacher forcing in a single pass."""
    pair = pair_of(window, memory_seed=0)
    num_frames = 5 * pair.config.num_frames_per_block
    one = tiny_transformer(**WINDOWS[window])
    assert (teacher_forcing(pair, num_frames) - teacher_forcing(one, num_frames)).abs().max() <= 1e-5
    if checkpointing:
        for expert in pair.children():
            expert.enable_gradient_checkpointing()
    expected, both = gradients(one, num_frames), gradients(pair, num_frames)
    for name, gradient in expected.items():
        parts = [both[f"{expert}.{name}"] for expert in ("transformer", "memory_transformer")]
        torch.testing.assert_close(sum(parts), gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item())
    # Both parts are there.
    for expert in ("transformer", "memory_transformer"):
        assert both[f"{expert}.blocks.0.attn1.to_k.weight"].abs().max() > 1e-2


@pytest.mark.parametrize("window", WINDOWS)
def test_gradients_equal_plain_autograd(window):
    pair = pair_of(window)
    num_frames = 4 * pair.config.num_frames_per_block
    result = gradients(pair, num_frames)
    leaves = {name: p.detach().double().requires_grad_() for name, p in pair.named_parameters()}
    parts = [
        {name.removeprefix(f"{expert}."): leaf for name, leaf in leaves.items() if name.startswith(f"{expert}.")}
        for expert in ("transformer", "memory_transformer")
    ]
    clean, noisy, timestep, text = clip(num_frames)
    slow = ReferenceExperts(*parts, dict(pair.config))
    slow.teacher_forcing(noisy, clean, timestep, text, detach=False).square().sum().backward()
    for name, leaf in leaves.items():
        wanted = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        tolerance = 1e-4 * wanted.abs().max().item() + 1e-6
        torch.testing.assert_close(result[name].double(), wanted, rtol=1e-4, atol=tolerance)


def test_a_single_block_has_no_past():
    pair = pair_of("chunkwise")
    clean, noisy, timestep, text = clip(3)
    alone = pair.transformer(noisy, timestep, text, return_dict=False)[0]
    assert (teacher_forcing(pair, 3) - alone).abs().max() <= 1e-5


def test_a_pass_in_which_the_memory_expert_has_no_part():
    pair, (_, noisy, timestep, text) = pair_of("unlimited"), clip(6)
    with pytest.raises(ValueError, match="has no part in a pass without `kv_cache` or `clean_hidden_states`"):
        pair(noisy, timestep, text)


def test_a_clip_without_its_graph_is_a_constant():
    transformer = tiny_transformer()
    clean, _, _, text = clip(3)
    for keeps_graph in (False, True):
        cache = ClipKVCache(transformer.config.num_layers, keeps_graph)
        transformer(clean, torch.zeros(2), text, kv_cache=cache, kv_cache_mode="store")
        assert cache.get(1).keys[0].requires_grad == keeps_graph


def test_it_is_a_causal_transformer():
    pair = pair_of("chunkwise")
    assert not pair.packs_blocks and pair.packs_clips and pair.config.sink_size == 3
    assert pair.dtype == torch.float32 and pair.device == torch.device("cpu") and not pair.training
