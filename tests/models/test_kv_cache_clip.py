"""Passes over several blocks of a clip, against one pass with teacher forcing and against a block at a time."""

import functools

import pytest
import torch

from astrolabe_diffusers import CausalWanKVCache
from astrolabe_diffusers.models.kv_cache_clip import ClipKVCache
from astrolabe_diffusers.models.kv_cache_shared_past import SharedPastKVCache
from tests.tiny_pipeline import tiny_transformer


CONFIGS = {
    "unlimited": {},
    "one frame a block": {"num_frames_per_block": 1, "local_attn_size": 4, "sink_size": 1},
    "window": {"local_attn_size": 9},
    "no whole blocks": {"local_attn_size": 8, "sink_size": 1, "rope_mode": "relative"},
    "sink": {"local_attn_size": 12, "sink_size": 3},
    "relative": {"local_attn_size": 12, "sink_size": 3, "rope_mode": "relative"},
    "gap": {"local_attn_size": 9, "sink_size": 3, "rope_mode": "relative", "rope_window": 11},
    "only the sink": {"local_attn_size": 6, "sink_size": 3, "rope_mode": "relative"},
}
# How many blocks go into the passes that store.
PASSES = [(6,), (1, 1, 1, 1, 1, 1), (2, 2, 2), (4, 2), (1, 5)]
transformer_of = functools.cache(lambda name: tiny_transformer(**CONFIGS[name]))


def clip(num_frames, batch_size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    clean, noisy = torch.randn(2, batch_size, 4, num_frames, 4, 4, generator=generator)
    timestep = torch.tensor([937.5, 625.0, 833.3])[:batch_size]
    return clean, noisy, timestep, torch.randn(batch_size, 16, 32, generator=generator)


def new_cache(transformer):
    return ClipKVCache(transformer.config.num_layers)


def run(transformer, cache, latents, timestep, embeds, mode, start):
    inputs = latents, timestep.expand(len(latents)), embeds
    return transformer(*inputs, kv_cache=cache, kv_cache_mode=mode, frame_offset=start, return_dict=False)[0]


@torch.no_grad()
def store(transformer, cache, clean, embeds, mode="store"):
    return run(transformer, cache, clean, torch.zeros(1), embeds, mode, cache.num_frames)


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("name", CONFIGS)
def test_as_with_teacher_forcing(name, passes):
    """Each pass is read as soon as its clean blocks are stored, and the block after it."""
    transformer = transformer_of(name)
    n = transformer.config.num_frames_per_block
    clean, noisy, timestep, embeds = clip(7 * n, 2)
    with torch.no_grad():
        expected = transformer(noisy, timestep, embeds, clean_hidden_states=clean).sample
        blind = transformer(noisy, timestep, embeds, clean_hidden_states=torch.zeros_like(clean)).sample
    assert (blind - expected)[:, :, n:].abs().max() > 1e-2
    cache = new_cache(transformer)
    for number in passes:
        start = cache.num_frames
        stop = start + number * n
        store(transformer, cache, clean[:, :, start:stop], embeds)
        for with_grad in (False, True):
            with torch.set_grad_enabled(with_grad):
                flow = run(transformer, cache, noisy[:, :, start : stop + n], timestep, embeds, "read", start)
            assert flow.requires_grad == with_grad
            assert (flow - expected[:, :, start : stop + n]).abs().max() < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_clean_passes_are_the_whole_clip_s(name):
    transformer = transformer_of(name)
    n = transformer.config.num_frames_per_block
    clean, _, _, embeds = clip(7 * n, 2)
    with torch.no_grad():
        expected = transformer(clean, torch.zeros(2), embeds).sample
    cache = new_cache(transformer)
    parts = [store(transformer, cache, part, embeds, "write") for part in clean.split(2 * n, dim=2)]
    assert (torch.cat(parts, dim=2) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_block_by_block(name, checkpointing):
    transformer = tiny_transformer(**CONFIGS[name])
    n = transformer.config.num_frames_per_block
    clean, noisy, timestep, embeds = clip(5 * n, 2)
    if checkpointing:
        transformer.enable_gradient_checkpointing()

    def gradients(flow):
        transformer.zero_grad()
        flow.square().sum().backward()
        return [p.grad.clone() for p in transformer.parameters()]

    each = CausalWanKVCache(transformer.config.num_layers, max_frames=5 * n)
    flows = []
    for start in range(0, 5 * n, n):
        block = slice(start, start + n)
        flows.append(gradients(run(transformer, each, noisy[:, :, block], timestep, embeds, "read", start)))
        store(transformer, each, clean[:, :, block], embeds)
    expected = [sum(parts) for parts in zip(*flows)]
    cache = new_cache(transformer)
    store(transformer, cache, clean[:, :, : 4 * n], embeds)
    result = gradients(run(transformer, cache, noisy, timestep, embeds, "read", 0))
    for a, b in zip(result, expected):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=1)
    assert all(key.grad_fn is None for layer in cache.layer_caches for key in layer.keys if key is not None)


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("num_past", [1, 2, 6])
@pytest.mark.parametrize("name", [name for name in CONFIGS if "frame" not in name])
def test_videos_that_share_a_past(name, num_past, with_grad):
    """Against the cache that knows one block a pass; own blocks in passes of two, and a last one."""
    transformer = transformer_of(name)
    clean, noisy, timestep, embeds = clip((num_past + 5) * 3, 3)
    start = num_past * 3
    past = clean[:1, :, :start]
    embeds = embeds[:1].expand(3, -1, -1)

    one = CausalWanKVCache(transformer.config.num_layers, max_frames=start + 3)
    for block in past.split(3, dim=2):
        store(transformer, one, block, embeds[:1])
    each = SharedPastKVCache(one, 3, clean.shape[2])
    cache = new_cache(transformer)
    for part in past.split(6, dim=2):
        store(transformer, cache, part, embeds[:1])

    for first in (start, start + 6, start + 12):
        frames = slice(first, min(first + 6, clean.shape[2]))
        store(transformer, cache, clean[:, :, frames], embeds)
        with torch.set_grad_enabled(with_grad):
            result = run(transformer, cache, noisy[:, :, frames], timestep, embeds, "read", first)
        expected = []
        for i, block in enumerate(noisy[:, :, frames].split(3, dim=2)):
            with torch.no_grad():
                expected.append(run(transformer, each, block, timestep, embeds, "read", first + 3 * i))
            store(transformer, each, clean[:, :, first + 3 * i : first + 3 * i + 3], embeds)
        assert (result - torch.cat(expected, dim=2)).abs().max() < 1e-5
    rows = {len(key) for key in cache.get(0).keys if key is not None}
    assert rows == ({3} if CONFIGS[name] == {"local_attn_size": 9} else {1, 3})


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_teacher_forcing_after_a_past(name, shared):
    """As in one pass over the whole clip; gradients are those of its last blocks, through their clean halves too."""
    transformer = tiny_transformer(**CONFIGS[name])
    n = transformer.config.num_frames_per_block
    clean, noisy, timestep, embeds = clip(7 * n, 2)
    if shared:
        clean[1, :, : 4 * n], embeds[1] = clean[0, :, : 4 * n], embeds[0]
    own, past_inputs = clean[:, :, 4 * n :].requires_grad_(), clean[:, :, : 4 * n].detach()
    whole = torch.cat([past_inputs, own], dim=2)
    expected = transformer(noisy, timestep, embeds, clean_hidden_states=whole).sample[:, :, 4 * n :]
    (slope,) = torch.autograd.grad(expected.square().sum(), own)
    cache, rows = new_cache(transformer), slice(1) if shared else slice(2)
    store(transformer, cache, past_inputs[rows], embeds[rows])
    transformer.enable_gradient_checkpointing()
    result = transformer(
        noisy[:, :, 4 * n :],
        timestep,
        embeds,
        kv_cache=cache,
        kv_cache_mode="read",
        frame_offset=4 * n,
        clean_hidden_states=own,
    ).sample
    assert (result - expected).abs().max() < 1e-5
    (own_slope,) = torch.autograd.grad(result.square().sum(), own)
    assert (slope[:, :, :n].abs().max() > 1e-3) == (name != "only the sink")
    torch.testing.assert_close(own_slope, slope, rtol=1e-4, atol=1e-5)
    assert cache.num_frames == 4 * n


def test_memory_follows_the_window():
    """Tokens whose storage is alive after forty blocks, two a pass: at most the window's and those of two passes."""
    transformer = transformer_of("relative")
    clean, _, _, embeds = clip(6, 1)
    cache = new_cache(transformer)
    for _ in range(20):
        store(transformer, cache, clean, embeds)
        for layer in cache.layer_caches:
            for units in (layer.keys, layer.values):
                storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in units if x is not None}
                tokens = sum(s.nbytes() for s in storages.values()) // (2 * 12 * 4)
                assert tokens <= 4 * (9 + 6)
    assert cache.num_frames == 120


@torch.no_grad()
def test_what_cannot_be_stored_or_read():
    transformer = transformer_of("sink")
    clean, noisy, timestep, embeds = clip(36, 1)
    cache = new_cache(transformer)

    def read(start, stop):
        return run(transformer, cache, noisy[:, :, start:stop], timestep, embeds, "read", start)

    store(transformer, cache, clean[:, :, :18], embeds)
    read(0, 21)
    with pytest.raises(ValueError, match="lacks frames that a block from latent frame 21 on sees"):
        read(0, 24)
    with pytest.raises(ValueError, match="lacks frames that a block from latent frame 4 on sees"):
        read(4, 7)
    store(transformer, cache, clean[:, :, 18:24], embeds)
    read(18, 27)
    with pytest.raises(ValueError, match="latent frame 15 on sees"):
        read(15, 21)
    with pytest.raises(ValueError, match="`frame_offset` must be 24.*but is 21"):
        run(transformer, cache, clean[:, :, :3], timestep, embeds, "store", 21)
    with pytest.raises(ValueError, match=r"height and width \(4, 4\), but these blocks have \(4, 8\)"):
        store(transformer, cache, torch.zeros(1, 4, 3, 4, 8), embeds)
    with pytest.raises(ValueError, match=r"must be one of \('read', 'write', 'store'\) but is 'store\+read'"):
        store(transformer, cache, clean[:, :, 24:30], embeds, "store+read")
    cache.clear()
    store(transformer, cache, torch.zeros(2, 4, 3, 4, 8), embeds.expand(2, -1, -1))
    with pytest.raises(ValueError, match="has blocks of 2 videos, and these are of 3"):
        run(transformer, cache, torch.zeros(3, 4, 3, 4, 8), timestep, embeds.expand(3, -1, -1), "read", 3)
    assert cache.num_frames == 3


def test_clean_blocks_of_a_pass_follow_those_stored():
    transformer = transformer_of("sink")
    clean, noisy, timestep, embeds = clip(12, 1)
    cache = new_cache(transformer)
    store(transformer, cache, clean[:, :, :6], embeds)
    arguments = {"kv_cache": cache, "kv_cache_mode": "read", "clean_hidden_states": clean[:, :, 9:]}
    with pytest.raises(ValueError, match="`frame_offset` must be 6.*but is 9"):
        transformer(noisy[:, :, 9:], timestep, embeds, frame_offset=9, **arguments)
    with pytest.raises(ValueError, match="pass `kv_cache` or `clean_hidden_states`.*a `ClipKVCache` that is read"):
        transformer(noisy[:, :, 6:9], timestep, embeds, frame_offset=6, **arguments | {"kv_cache_mode": "store"})
