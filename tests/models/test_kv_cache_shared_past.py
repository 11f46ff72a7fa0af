"""Videos that go on from one, against the same videos with a cache each."""

import pytest
import torch

from astrolabe_diffusers import CausalWanKVCache
from astrolabe_diffusers.models import kv_cache_shared_past
from astrolabe_diffusers.models.attention import attend_with_shared_past
from astrolabe_diffusers.models.kv_cache_shared_past import SharedPastKVCache
from tests.tiny_pipeline import tiny_transformer


N = 3  # latent frames a block
CONFIGS = {
    "unlimited": {},
    "window": {"local_attn_size": 9},
    "sink": {"local_attn_size": 12, "sink_size": 3},
    "relative": {"local_attn_size": 12, "sink_size": 3, "rope_mode": "relative"},
    "gap": {"local_attn_size": 9, "sink_size": 3, "rope_mode": "relative", "rope_window": 11},
    "tight": {"local_attn_size": 6, "sink_size": 3, "rope_mode": "relative"},
    "only the sink": {"local_attn_size": 6, "sink_size": 3},
}


def blocks(number, batch_size, seed):
    return torch.randn(number, batch_size, 4, N, 4, 4, generator=torch.Generator().manual_seed(seed))


def run(transformer, cache, block, embeds, mode):
    timestep = torch.full((len(block),), 0.0 if mode == "write" else 625.0)
    return transformer(
        block, timestep, embeds, kv_cache=cache, kv_cache_mode=mode, frame_offset=cache.num_frames, return_dict=False
    )[0]


def go_on(transformer, cache, own, embeds):
    """Predictions of every own block, each of which is then stored."""
    outputs = []
    for block in own:
        outputs.append(run(transformer, cache, block, embeds, "read"))
        with torch.no_grad():
            run(transformer, cache, block, embeds, "write")
    return torch.stack(outputs)


@pytest.mark.parametrize("num_past", [1, 2, 6])
@pytest.mark.parametrize("config", CONFIGS)
def test_as_with_a_cache_each(config, num_past):
    """Over five own blocks, so that window and ring roll on; and three times from the same past."""
    transformer = tiny_transformer(**CONFIGS[config])
    past, own = blocks(num_past, 1, 0), blocks(5, 3, 1)
    embeds = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(2))
    total = (num_past + 5) * N
    num_layers = transformer.config.num_layers

    each = CausalWanKVCache(num_layers, max_frames=total)
    shared = CausalWanKVCache(num_layers, max_frames=(num_past + 1) * N)
    with torch.no_grad():
        for block in past:
            run(transformer, each, block.expand(3, -1, -1, -1, -1), embeds.expand(3, -1, -1), "write")
            run(transformer, shared, block, embeds, "write")
        expected = go_on(transformer, each, own, embeds.expand(3, -1, -1))
        # The context is seen at all.
        blind = go_on(transformer, CausalWanKVCache(num_layers, max_frames=N), own[:1], embeds.expand(3, -1, -1))
        assert (blind - expected[:1]).abs().max() > 1e-3
    for with_grad, number in ((False, 5), (True, 5), (False, 1)):
        with torch.set_grad_enabled(with_grad):
            videos = SharedPastKVCache(shared, 3, total)
            result = go_on(transformer, videos, own[:number], embeds.expand(3, -1, -1))
        assert result.requires_grad == with_grad
        assert (result - expected[:number]).abs().max() < 1e-5
    assert all(layer.key.shape[0] == 1 for layer in shared.layer_caches)


def test_the_steps_of_a_block_see_one_copy(monkeypatch):
    transformer, embeds = tiny_transformer(**CONFIGS["relative"]), torch.randn(1, 16, 32)
    cache, joined = CausalWanKVCache(transformer.config.num_layers), []
    join = kv_cache_shared_past._joined
    monkeypatch.setattr(kv_cache_shared_past, "_joined", lambda *arguments: joined.append(1) or join(*arguments))
    with torch.no_grad():
        for block in blocks(6, 1, 0):
            run(transformer, cache, block, embeds, "write")
        videos, block = SharedPastKVCache(cache, 3, 24), blocks(1, 3, 1)[0]
        first = run(transformer, videos, block, embeds.expand(3, -1, -1), "read")
        number = len(joined)
        again = [run(transformer, videos, block, embeds.expand(3, -1, -1), "read") for _ in range(3)]
    assert 0 < number == len(joined) and all(torch.equal(first, other) for other in again)


def test_no_copy_of_an_unlimited_past():
    transformer = tiny_transformer()
    embeds = torch.randn(1, 16, 32)
    cache = CausalWanKVCache(transformer.config.num_layers, max_frames=9)
    with torch.no_grad():
        for block in blocks(2, 1, 0):
            run(transformer, cache, block, embeds, "write")
        videos = SharedPastKVCache(cache, 4, 15)
        go_on(transformer, videos, blocks(2, 4, 1), embeds.expand(4, -1, -1))
    key, value = videos.get(0).past
    buffers = cache.get(0)
    assert key.untyped_storage().data_ptr() == buffers.key.untyped_storage().data_ptr() and key.shape[0] == 1
    assert value.untyped_storage().data_ptr() == buffers.value.untyped_storage().data_ptr()


def test_merged_attention():
    """Against one softmax over all keys, in float64; scores from tiny to large."""
    generator = torch.Generator().manual_seed(0)
    for scale in (0.01, 1.0, 8.0):
        query, key, value = (scale * torch.randn(3, 5, 2, 8, generator=generator) for _ in range(3))
        past = [torch.randn(1, 7, 2, 8, generator=generator) for _ in range(2)]
        keys, values = (torch.cat([p.expand(3, -1, -1, -1), x], 1).double() for p, x in zip(past, (key, value)))
        scores = torch.einsum("bqhd,bkhd->bhqk", query.double(), keys) / 8**0.5
        expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values)
        with torch.no_grad():
            result = attend_with_shared_past(query, past, (key, value))
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("length", [5, 32, 40])
def test_what_torch_compile_is_told_of_it(length):
    tensors = [torch.randn(3, size, 2, 8) for size in (length, 9, 9)]
    operator = torch.ops.astrolabe_diffusers.attend_with_logsumexp.default
    torch.library.opcheck(operator, tensors, test_utils=("test_schema", "test_faketensor"))


def test_a_past_that_cannot_be_shared():
    transformer = tiny_transformer(local_attn_size=12, sink_size=6)
    cache = CausalWanKVCache(transformer.config.num_layers)
    with pytest.raises(ValueError, match="at least one block"):
        SharedPastKVCache(cache, 2, None)
    with torch.no_grad():
        run(transformer, cache, blocks(1, 1, 0)[0], torch.randn(1, 16, 32), "write")
    with pytest.raises(ValueError, match="the sink, 6 latent frames.*this one has 3"):
        SharedPastKVCache(cache, 2, None)
