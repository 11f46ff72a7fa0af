"""`rope_window` against Self Gradient Forcing as it is published: keys are cached without positions, and every block
gives the sink rows 0, 1, ... of the table, and the window rows that end with its last frame's, or the table's last."""

import pytest
import torch

from astrolabe_diffusers.models.kv_cache_clip import ClipKVCache
from tests.models.test_reference_causal_wan import max_error
from tests.models.test_transformer_causal_wan import TOLERANCE, blocks_of, build, new_cache, read, write
from tests.models.test_two_blocks import go_on
from tests.reference_causal_wan import ReferenceCausalWan
from tests.tiny_pipeline import tiny_transformer


# Frames in a block, window, sink, rows.
GAPS = [(3, 12, 3, 21), (3, 9, 3, 10), (3, 8, 1, 11), (2, 6, 2, 9), (1, 5, 2, 8), (1, 4, 2, 4)]


class PublishedRows(ReferenceCausalWan):
    """Rows as published, in place of positions that only have the same differences."""

    def __init__(self, *args, rows: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.rows = rows

    def self_attention(self, query, start, keys_and_values, grid, past=range(0), sink_offset=0):
        end = start + query.shape[1]
        last_row = min(end - 1, self.rows - 1)
        row = {frame: last_row - (end - 1 - frame) for frame in range(end)}
        row |= {frame: frame for frame in range(min(self.sink, end))}
        assert len({row[frame] for frame in keys_and_values}) == len(keys_and_values)
        query = self.rotate(query, [row[frame] for frame in range(start, end)], *grid)
        keys, values = (torch.stack(frames, dim=1) for frames in zip(*keys_and_values.values()))
        keys = self.rotate(keys, [row[frame] for frame in keys_and_values], *grid)
        return self.attention(*(x.flatten(1, 2) for x in (query, keys, values))).unflatten(1, query.shape[1:3])


def build_with_rows(n, window, sink, rows):
    """A model, its reference, clips long enough that the window rolls past the rows, and text."""
    model, _, _, _, text = build(n, window, sink, "relative", rope_window=rows)
    reference = PublishedRows(model.state_dict(), dict(model.config), rows=rows)
    shape = (len(text), 4, (rows + window) // n * n + n, 2, 4)
    noisy, clean = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    return model, reference, noisy, clean, text


def expected_reads(reference, noisy, clean, text, levels):
    """Of every block at each of the levels, and of the clean one."""
    context = reference.context_of(clean[:, :, :0], text)
    for own, own_clean in zip(*(blocks_of(video, reference.frames_per_block) for video in (noisy, clean))):
        times = [torch.full((len(text),), level) for level in levels]
        reads = [reference.block(own, time, text, context, store=False) for time in times]
        yield reads, reference.block(own_clean, torch.zeros(len(text)), text, context, store=True)


@torch.no_grad()
@pytest.mark.parametrize("n, window, sink, rows", GAPS)
def test_cached_blocks(n, window, sink, rows):
    model, reference, noisy, clean, text = build_with_rows(n, window, sink, rows)
    cache, levels = new_cache(model), (1000.0, 625.0)
    blocks = zip(blocks_of(noisy, n), blocks_of(clean, n), expected_reads(reference, noisy, clean, text, levels))
    for own, own_clean, (reads, written) in blocks:
        for level, wanted in zip(levels, reads):
            assert max_error(read(model, own, level, text, cache), wanted) <= TOLERANCE
        assert max_error(write(model, own_clean, text, cache), written) <= TOLERANCE
    assert cache.num_frames > rows + window - n


@torch.no_grad()
@pytest.mark.parametrize("n, window, sink, rows", GAPS)
def test_whole_clips(n, window, sink, rows):
    model, reference, noisy, clean, text = build_with_rows(n, window, sink, rows)
    timestep = torch.rand(noisy.shape[0], noisy.shape[2]) * 1000
    for kwargs, reference_kwargs in (({}, {}), ({"clean_hidden_states": clean}, {"clean": clean})):
        result = model(noisy, timestep, text, **kwargs).sample
        assert max_error(result, reference.forward(noisy, timestep, text, **reference_kwargs)) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("n, window, sink, rows", GAPS)
def test_two_blocks_a_pass(n, window, sink, rows):
    model, reference, noisy, clean, text = build_with_rows(n, window, sink, rows)
    outputs, pairs = go_on(model, noisy, clean, text, new_cache(model), n)
    assert pairs > 2
    reads = [reads for reads, _ in expected_reads(reference, noisy, clean, text, (937.5, 500.0))]
    context = reference.context_of(clean[:, :, :0], text)
    reads[0] = [reference.block(noisy[:, :, :n], torch.full((len(text),), 1000.0), text, context, store=False)]
    for output, wanted in zip(outputs, sum(reads, []), strict=True):
        assert max_error(output, wanted) <= TOLERANCE


@pytest.mark.parametrize("n, window, sink, rows", [(3, 12, 3, 21), (2, 6, 2, 9)])
def test_gradients(n, window, sink, rows):
    """Of several blocks a pass through a cache of the clip, as training has them, against plain autograd."""
    model, reference, noisy, clean, text = build_with_rows(n, window, sink, rows)
    level, num_stored = torch.full((len(text),), 625.0), clean.shape[2] - n
    cache = ClipKVCache(model.config.num_layers)
    with torch.no_grad():
        model(clean[:, :, :num_stored], torch.zeros(len(text)), text, kv_cache=cache, kv_cache_mode="store")
    model(noisy, level, text, kv_cache=cache, kv_cache_mode="read").sample.square().mean().backward()
    weights = {name: weight.requires_grad_() for name, weight in reference.weights.items()}
    context, flows = reference.context_of(clean[:, :, :0], text), []
    for own, own_clean in zip(blocks_of(noisy, n), blocks_of(clean, n)):
        flows.append(reference.block(own, level, text, context, store=False))
        with torch.no_grad():
            reference.block(own_clean, torch.zeros(len(text)), text, context, store=True)
    torch.cat(flows, dim=2).square().mean().backward()
    for name, parameter in model.named_parameters():
        wanted = weights[name].grad
        assert (parameter.grad - wanted).abs().max() <= 1e-5 * max(1.0, wanted.abs().max())


@torch.no_grad()
def test_it_matters_and_the_window_is_the_default():
    results = []
    for rows in (None, 9, 12):
        model, _, noisy, _, text = build(3, 9, 3, "relative", rope_window=rows)
        results.append(model(torch.cat([noisy, noisy], dim=2), torch.full((2,), 625.0), text).sample)
    default, same, wider = results
    assert torch.equal(default, same)
    difference = (default - wider).abs().amax(dim=(0, 1, 3, 4))
    assert difference[:9].max() == 0 and difference[9:].min() > 1e-4


@torch.no_grad()
def test_after_frames_of_any_number():
    """A start image is one frame: what leaves the window and where the sink is do not depend on whole blocks."""
    model, _, _, clean, text = build(3, 9, 3, "relative", rope_window=14)
    reference = PublishedRows(model.state_dict(), dict(model.config), rows=14)
    clean = clean.repeat(1, 1, 3, 1, 1)[:, :, :28]
    cache, context = new_cache(model), reference.context_of(clean[:, :, :0], text)
    for block in clean.split([1, *[3] * 9], dim=2):
        wanted = reference.block(block, torch.zeros(len(text)), text, context, store=True)
        assert max_error(write(model, block, text, cache), wanted) <= TOLERANCE


@pytest.mark.parametrize(
    "config, message",
    [
        ({"rope_mode": "absolute", "local_attn_size": 9}, "needs rope_mode='relative' and a window"),
        ({"rope_mode": "relative"}, "needs rope_mode='relative' and a window"),
        ({"rope_mode": "relative", "local_attn_size": 15}, "at least `local_attn_size` = 15, but is 12"),
        ({"rope_mode": "relative", "local_attn_size": 9, "rope_window": 9.5}, "whole number .* but is 9.5"),
    ],
)
def test_what_a_user_gets_wrong(config, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny_transformer(**{"rope_window": 12, **config})
    assert "\n" not in str(error.value)
