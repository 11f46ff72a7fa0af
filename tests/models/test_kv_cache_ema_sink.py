"""A sink that takes up what leaves the window, against the slow reference, which computes it anew for every block."""

import copy
import functools

import pytest
import torch

from astrolabe_diffusers import CausalWanKVCache, CausalWanTransformer3DModel
from astrolabe_diffusers.models.kv_cache_clip import ClipKVCache
from astrolabe_diffusers.models.kv_cache_shared_past import share_past
from tests.models import test_kv_cache_clip as clips
from tests.models.test_transformer_causal_wan import (
    SETTINGS,
    TOLERANCE,
    assert_one_line,
    blocks_of,
    max_error,
    read,
    write,
)
from tests.models.test_transformer_causal_wan import build as build_static
from tests.models.test_two_blocks import check_pairs, go_on, pair


# Frames in a block, window, sink: as released; nothing beside the sink; sinks of one frame, of part of a block and of
# several blocks; windows of no whole blocks.
SIZES = [(3, 9, 3), (3, 6, 3), (3, 12, 3), (2, 5, 1), (1, 4, 2), (3, 8, 1), (3, 12, 6), (3, 11, 2), (1, 5, 3)]
ALL = [
    *((*sizes, "relative") for sizes in SIZES),
    *((*sizes, "absolute") for sizes in [(3, 9, 3), (2, 5, 1), (3, 12, 6)]),
]
# At which a frame that has left is soon seen.
DECAY = 0.7


def build(n, window, sink, rope_mode="relative", **config):
    return build_static(n, window, sink, rope_mode, **{"sink_ema": DECAY, **config})


def video_of(n, num_blocks, seed=3):
    shape = SETTINGS[n][1]
    return torch.randn(*shape[:2], n * num_blocks, *shape[3:], generator=torch.Generator().manual_seed(seed))


# One block after the other


@torch.no_grad()
def test_the_third_block_takes_the_first_one_up():
    """As in Reward Forcing: window 9, sink 3, blocks of 3. Values need no rotation: they can be told from the layers'
    outputs."""
    model, _, _, _, text = build(3, 9, 3, sink_ema=0.999)
    clean, values = video_of(3, 9), []
    model.blocks[1].attn1.to_v.register_forward_hook(lambda module, args, output: values.append(output))
    cache = model.new_kv_cache()
    sinks = []
    for block in blocks_of(clean, 3):
        write(model, block, text, cache)
        read(model, block, 500.0, text, cache)
        values.pop()
        end, tokens = cache.state.end, 3 * cache.state.frame_tokens
        # The slots go from right to left.
        sinks.append(cache.get(1).value[:, end - tokens : end].flatten(2).unflatten(1, (3, -1)).flip(1).flatten(1, 2))
    expected = values[0]
    for number in range(9):
        # Once block `number` is stored the next one comes: from block 3 on, block 1 and those after it leave.
        if number >= 2:
            expected = 0.999 * expected + 0.001 * values[number - 1]
        assert max_error(sinks[number], expected) < 1e-6
    assert max_error(sinks[8], values[0]) > 5e-3


@torch.no_grad()
@pytest.mark.parametrize("n, window, sink, rope_mode", ALL)
def test_streams_equal_the_reference(n, window, sink, rope_mode):
    """Eight blocks more than fill the window; reads at two noise levels a block."""
    model, reference, _, _, text = build(n, window, sink, rope_mode)
    num_blocks = 8 + window // n
    clean, noisy = video_of(n, num_blocks), video_of(n, num_blocks, 4)
    cache, context = model.new_kv_cache(), reference.context_of(clean[:, :, :0], text)
    for clean_block, noisy_block in zip(blocks_of(clean, n), blocks_of(noisy, n)):
        for level in (1000.0, 625.0):
            times = torch.full((len(text),), level)
            expected = reference.block(noisy_block, times, text, context, store=False)
            assert max_error(read(model, noisy_block, level, text, cache), expected) <= TOLERANCE
        expected = reference.block(clean_block, torch.zeros(len(text)), text, context, store=True)
        assert max_error(write(model, clean_block, text, cache), expected) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("n, window, sink, rope_mode", ALL)
def test_pairs_equal_the_reference(n, window, sink, rope_mode):
    check_pairs(*build(n, window, sink, rope_mode), n)


@torch.no_grad()
def test_nothing_is_taken_up_before_it_leaves():
    """Up to block 2 it is the static sink; then it is not, and ever less."""
    model, _, _, _, text = build(3, 9, 3)
    static, *_ = build_static(3, 9, 3, "relative")
    caches, differences = (model.new_kv_cache(), static.new_kv_cache()), []
    for block in blocks_of(video_of(3, 9), 3):
        outputs = [write(m, block, text, cache) for m, cache in zip((model, static), caches)]
        differences.append(max_error(*outputs))
    assert differences[:3] == [0, 0, 0] and min(differences[3:]) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("n, window, sink", [(3, 9, 3), (2, 5, 1)])
def test_beyond_the_table_of_positions(n, window, sink):
    model, reference, _, _, text = build(n, window, sink, rope_max_seq_len=window + 1)
    clean = video_of(n, 2 * window // n + 4)
    cache, context = model.new_kv_cache(), reference.context_of(clean[:, :, :0], text)
    outputs = []
    for block in blocks_of(clean, n):
        expected = reference.block(block, torch.zeros(len(text)), text, context, store=True)
        outputs.append(write(model, block, text, cache))
        assert max_error(outputs[-1], expected) <= TOLERANCE
    whole = model(clean, torch.zeros(len(text)), text).sample
    assert max_error(whole, torch.cat(outputs, dim=2)) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("first", [1, 2, 5])
def test_first_block_of_any_size(first):
    model, reference, _, _, text = build(3, 9, 3)
    clean = video_of(3, 9)[:, :, : first + 18]
    cache, context = model.new_kv_cache(), reference.context_of(clean[:, :, :0], text)
    for block in clean.split([first, *[3] * 6], dim=2):
        expected = reference.block(block, torch.zeros(2), text, context, store=True)
        assert max_error(write(model, block, text, cache), expected) <= TOLERANCE


@torch.no_grad()
def test_read_leaves_no_trace():
    model, _, _, _, text = build(3, 9, 3)
    disturbed, quiet = model.new_kv_cache(), model.new_kv_cache()
    for block in blocks_of(video_of(3, 7), 3):
        first = read(model, block, 1000.0, text, disturbed)
        read(model, 100 * torch.randn_like(block), 250.0, text, disturbed)
        assert torch.equal(read(model, block, 1000.0, text, disturbed), first)
        assert torch.equal(write(model, block, text, disturbed), write(model, block, text, quiet))


@torch.no_grad()
@pytest.mark.parametrize("n, window, sink, rope_mode", ALL)
def test_recache_again_and_again(n, window, sink, rope_mode):
    """With another text each time: with the sink kept, as when the stream goes on, and built anew; directly after the
    last one, too."""
    model, reference, _, _, _ = build(n, window, sink, rope_mode)
    clean, rows = video_of(n, 12 + window // n), SETTINGS[n][1][0]
    texts = iter(torch.randn(9, rows, 5, model.config.text_dim, generator=torch.Generator().manual_seed(0)))
    cache, context, text = model.new_kv_cache(), reference.context_of(clean[:, :, :0], None), next(texts)
    moved = window // n + 1  # blocks
    changes = {moved: [True], moved + 2: [True, True], moved + 3: [False], moved + 4: [True], moved + 7: [False, True]}
    for number, block in enumerate(blocks_of(clean, n)):
        for keep_sink in changes.get(number, []):
            text, frames = next(texts), number * n
            video = clean[:, :, :frames]
            context = reference.recache(video, text, context, keep_sink)
            first = frames - window + sink * keep_sink
            cache.rewind(first, sink * keep_sink)
            read(model, video[:, :, first:], 0.0, text, cache, mode="store")
        expected = reference.block(block, torch.zeros(rows), text, context, store=True)
        assert max_error(write(model, block, text, cache), expected) <= TOLERANCE


# Videos of a batch


@torch.no_grad()
@pytest.mark.parametrize("paired", [False, True])
def test_batch_equals_singles_and_select(paired):
    """A video of a batch comes out as it does alone, and as one that parts from the batch in the middle."""
    model, _, _, _, text = build(3, 9, 3)
    clean, noisy = video_of(3, 9), video_of(3, 9, 4)
    together, _ = go_on(model, noisy, clean, text, model.new_kv_cache(), 3, paired)
    for video in range(2):
        rows = slice(video, video + 1)
        alone, pairs = go_on(model, noisy[rows], clean[rows], text[rows], model.new_kv_cache(), 3, paired)
        assert (pairs > 0) == paired
        assert max(max_error(a[rows], b) for a, b in zip(together, alone, strict=True)) <= TOLERANCE

    whole = model.new_kv_cache()
    for block in blocks_of(clean[:, :, :15], 3):
        write(model, block, text, whole)
    parted = whole.select([1])
    for clean_block, noisy_block in zip(blocks_of(clean[:, :, 15:], 3), blocks_of(noisy[:, :, 15:], 3)):
        if paired:
            outputs = pair(model, clean_block, noisy_block, 937.5, text, whole)
            own = pair(model, clean_block[1:], noisy_block[1:], 937.5, text[1:], parted)
        else:
            outputs = write(model, clean_block, text, whole)
            own = write(model, clean_block[1:], text[1:], parted)
        assert max_error(outputs[1:], own) <= TOLERANCE


@torch.no_grad()
def test_a_fork_leaves_the_other_alone():
    model, reference, _, _, text = build(3, 9, 3)
    clean, other = video_of(3, 9), video_of(3, 9, 4)
    cache, context = model.new_kv_cache(), reference.context_of(clean[:, :, :0], text)
    for number, block in enumerate(blocks_of(clean, 3)):
        if number == 5:
            fork, forked = cache.select([0, 1]), copy.deepcopy(context)
            for changed in blocks_of(other[:, :, 15:], 3):
                expected = reference.block(changed, torch.zeros(2), text, forked, store=True)
                assert max_error(write(model, changed, text, fork), expected) <= TOLERANCE
        expected = reference.block(block, torch.zeros(2), text, context, store=True)
        assert max_error(write(model, block, text, cache), expected) <= TOLERANCE


@pytest.mark.parametrize("num_past", [1, 2, 6])
@pytest.mark.parametrize("n, window, sink", [(3, 9, 3), (3, 6, 3), (3, 12, 6), (1, 4, 2)])
def test_videos_that_share_a_past(n, window, sink, num_past):
    """In streams and in passes of two blocks, against videos that have had a cache each from the beginning."""
    model, *_ = build(n, window, sink)
    num_past = max(num_past, sink // n)
    start, stop = num_past * n, (num_past + 6) * n
    generator = torch.Generator().manual_seed(0)
    channels, height, width = model.config.in_channels, 2, 4
    clean, noisy = torch.randn(2, 3, channels, stop, height, width, generator=generator)
    clean[:, :, :start] = clean[:1, :, :start]
    text = torch.randn(1, 5, model.config.text_dim, generator=generator).expand(3, -1, -1)

    one, each, clip = model.new_kv_cache(), model.new_kv_cache(), ClipKVCache(model.config.num_layers)
    with torch.no_grad():
        for block in blocks_of(clean[:, :, :start], n):
            write(model, block, text, each)
            write(model, block[:1], text[:1], one)
        for part in clean[:1, :, :start].split(2 * n, dim=2):
            read(model, part, 0.0, text[:1], clip, mode="store")
        stream = share_past(one, 3, stop)
        for first in range(start, stop, 2 * n):
            frames = slice(first, first + 2 * n)
            read(model, clean[:, :, frames], 0.0, text, clip, mode="store")
            inputs = noisy[:, :, frames], torch.full((3,), 625.0), text
            outputs = model(*inputs, kv_cache=clip, kv_cache_mode="read", frame_offset=first).sample
            for i in range(2):
                block = slice(first + i * n, first + (i + 1) * n)
                expected = read(model, noisy[:, :, block], 625.0, text, each)
                assert max_error(read(model, noisy[:, :, block], 625.0, text, stream), expected) <= TOLERANCE
                assert max_error(outputs[:, :, i * n : (i + 1) * n], expected) <= TOLERANCE
                for cache in (each, stream):
                    write(model, clean[:, :, block], text, cache)
        assert one.num_frames == start


# Several blocks a pass, and training


@torch.no_grad()
@pytest.mark.parametrize("n, window, sink, rope_mode", ALL)
def test_whole_clips_equal_the_reference(n, window, sink, rope_mode):
    model, reference, _, _, text = build(n, window, sink, rope_mode)
    num_blocks = 8 + window // n
    clean, noisy = video_of(n, num_blocks), video_of(n, num_blocks, 4)
    timestep = torch.rand(noisy.shape[0], noisy.shape[2]) * 1000
    out = model(noisy, timestep, text).sample
    assert max_error(out, reference.forward(noisy, timestep, text)) <= TOLERANCE
    out = model(noisy, timestep, text, clean_hidden_states=clean).sample
    assert max_error(out, reference.forward(noisy, timestep, text, clean=clean)) <= TOLERANCE


CLIPS = {
    f"{n}, {window}, {sink}": {"num_frames_per_block": n, "local_attn_size": window, "sink_size": sink}
    | {"rope_mode": "relative", "sink_ema": DECAY}
    for n, window, sink in SIZES
}
transformer_of = functools.cache(lambda name: clips.tiny_transformer(**CLIPS[name]))


@pytest.mark.parametrize("passes", [(8,), (1,) * 8, (2, 2, 2, 2), (5, 3), (1, 6, 1)])
@pytest.mark.parametrize("name", CLIPS)
def test_clip_passes_equal_teacher_forcing(name, passes):
    """Each pass is read as soon as its clean blocks are stored, whole and its last blocks alone, and the block after
    it."""
    transformer = transformer_of(name)
    n = transformer.config.num_frames_per_block
    clean, noisy, timestep, embeds = clips.clip(9 * n, 2)
    with torch.no_grad():
        expected = transformer(noisy, timestep, embeds, clean_hidden_states=clean).sample
    cache = clips.new_cache(transformer)
    for number in passes:
        start = cache.num_frames
        stop = start + number * n
        clips.store(transformer, cache, clean[:, :, start:stop], embeds)
        for first, with_grad in ((start, False), (start, True), (stop, False), (stop - n, True)):
            frames = slice(first, stop + n)
            with torch.set_grad_enabled(with_grad):
                flow = clips.run(transformer, cache, noisy[:, :, frames], timestep, embeds, "read", first)
            assert (flow - expected[:, :, frames]).abs().max() < 1e-5


@pytest.mark.parametrize("clean_context", [False, True])
@pytest.mark.parametrize("n, window, sink", [(3, 9, 3), (2, 5, 1)])
def test_gradients_equal_the_reference(n, window, sink, clean_context):
    """Through the context too: what left the window gets its gradients from the sink."""
    model, _, _, _, text = build(n, window, sink)
    clean, noisy = video_of(n, 6), video_of(n, 6, 4)
    timestep = torch.rand(len(text)) * 1000
    kwargs = [{"clean_hidden_states": clean}, {"clean": clean}] if clean_context else [{}, {}]
    # Of the last block alone, which sees the first ones only through the sink.
    weights = torch.zeros(n * 6)
    weights[-n:] = 1
    model(noisy, timestep, text, **kwargs[0]).sample.mul(weights[:, None, None]).square().sum().backward()
    slow = {name: value.detach().double().requires_grad_() for name, value in model.state_dict().items()}
    reference = type(build(n, window, sink)[1])(slow, dict(model.config))
    reference.forward(noisy, timestep, text, **kwargs[1]).mul(weights[:, None, None]).square().sum().backward()
    for name, parameter in model.named_parameters():
        expected = slow[name].grad
        assert (parameter.grad - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_clip_passes_are_those_block_by_block(checkpointing):
    transformer = clips.tiny_transformer(**CLIPS["3, 9, 3"])
    clean, noisy, timestep, embeds = clips.clip(18, 2)
    if checkpointing:
        transformer.enable_gradient_checkpointing()

    def gradients(flow):
        transformer.zero_grad()
        flow.square().sum().backward()
        return [p.grad.clone() for p in transformer.parameters()]

    each, flows = transformer.new_kv_cache(), []
    for start in range(0, 18, 3):
        block = slice(start, start + 3)
        flows.append(gradients(clips.run(transformer, each, noisy[:, :, block], timestep, embeds, "read", start)))
        clips.store(transformer, each, clean[:, :, block], embeds)
    cache = clips.new_cache(transformer)
    clips.store(transformer, cache, clean[:, :, :15], embeds)
    result = gradients(clips.run(transformer, cache, noisy, timestep, embeds, "read", 0))
    for a, b in zip(result, (sum(parts) for parts in zip(*flows))):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=1)


@torch.no_grad()
@pytest.mark.parametrize("name", ["3, 9, 3", "3, 6, 3"])
def test_what_is_in_the_sink_for_good_cannot_be_read_without(name):
    transformer = transformer_of(name)
    clean, noisy, timestep, embeds = clips.clip(36, 1)
    cache = clips.new_cache(transformer)
    for start in (0, 18):
        clips.store(transformer, cache, clean[:, :, start : start + 18], embeds)
    clips.run(transformer, cache, noisy[:, :, 18:], timestep, embeds, "read", 18)
    with pytest.raises(ValueError) as error:
        clips.run(transformer, cache, noisy[:, :, 15:], timestep, embeds, "read", 15)
    assert_one_line(error, "lacks frames that a block from latent frame 15 on sees")
    cache.clear()
    clips.store(transformer, cache, clean[:, :, :9], embeds)
    fresh = clips.new_cache(transformer)
    clips.store(transformer, fresh, clean[:, :, :9], embeds)
    flows = [clips.run(transformer, c, noisy[:, :, :12], timestep, embeds, "read", 0) for c in (cache, fresh)]
    assert torch.equal(*flows)


@torch.no_grad()
def test_clip_memory_follows_the_window():
    """Forty blocks, two a pass: the window's and those of two passes."""
    transformer = transformer_of("3, 9, 3")
    clean, _, _, embeds = clips.clip(6, 1)
    cache = clips.new_cache(transformer)
    for _ in range(20):
        clips.store(transformer, cache, clean, embeds)
        assert sum(key is not None for key in cache.get(0).keys) <= 2 + 4


# Types


@torch.no_grad()
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("upcast", [False, True])
def test_bfloat16(upcast, paired):
    """Values against the formula, in float32 or, as released, in the cache's type, bit for bit."""
    model, _, _, _, text = build(3, 9, 3, sink_ema=0.999, upcast_sink_ema=upcast)
    model, text = model.to(torch.bfloat16), text.to(torch.bfloat16)
    clean, noisy, values = video_of(3, 40).bfloat16(), video_of(3, 40, 4).bfloat16(), []
    model.blocks[0].attn1.to_v.register_forward_hook(lambda module, args, output: values.append(output))
    cache = model.new_kv_cache()
    for clean_block, noisy_block in zip(blocks_of(clean, 3), blocks_of(noisy, 3)):
        if paired:
            pair(model, clean_block, noisy_block, 500.0, text, cache)
            values[-1] = values[-1].chunk(2, dim=1)[0]
        else:
            write(model, clean_block, text, cache)
    expected = values[0].float() if upcast else values[0]
    for gone in values[1:-1]:
        expected = 0.999 * expected + (1 - 0.999) * gone.to(expected.dtype)
    # The slots go from right to left.
    end, tokens = cache.state.end, cache.state.frame_tokens
    slots = [slice(end - (i + 1) * tokens, end - i * tokens) for i in range(3)]
    sink = torch.cat([cache.get(0).value[:, slot] for slot in slots], dim=1).flatten(2)
    assert torch.equal(sink, expected.bfloat16())
    moved = (sink.float() - values[0]).norm() / values[0].float().norm()
    assert 0.03 < moved < 0.05 if upcast else moved < 0.01


@torch.no_grad()
@pytest.mark.parametrize("upcast", [False, True])
def test_clips_in_bfloat16(upcast):
    """As streams, no further from float32 than these."""
    errors = {"stream": [], "clip": []}
    for seed in range(3):
        model, reference, _, _, text = build(3, 9, 3, seed=seed, upcast_sink_ema=upcast)
        model, text = model.to(torch.bfloat16), text.bfloat16()
        clean = video_of(3, 9, seed).bfloat16()
        wanted = build(3, 9, 3, seed=seed)[0](clean.float(), torch.zeros(2), text.float()).sample
        stream, clip = model.new_kv_cache(), ClipKVCache(model.config.num_layers)
        outputs = {
            "stream": [write(model, block, text, stream) for block in blocks_of(clean, 3)],
            "clip": [write(model, part, text, clip) for part in clean.split(6, dim=2)],
        }
        for way, parts in outputs.items():
            errors[way].append((torch.cat(parts, dim=2).float() - wanted).norm() / wanted.norm())
    stream, clip = (torch.stack(errors[way]).mean() for way in ("stream", "clip"))
    assert 1e-3 < stream < 5e-2 and clip <= 1.1 * stream


# Configuration


def test_save_and_load(tmp_path):
    model, *_ = build(3, 9, 3, upcast_sink_ema=False)
    model.save_pretrained(tmp_path)
    loaded = CausalWanTransformer3DModel.from_pretrained(tmp_path).config
    assert (loaded.sink_ema, loaded.upcast_sink_ema) == (DECAY, False)


@torch.no_grad()
def test_a_window_or_sink_that_is_taken_away():
    """As settings of training do: there is nothing to take up, or nothing to take it up."""
    model, _, noisy, _, text = build(3, 9, 3)
    for changes in ({"sink_size": 0}, {"local_attn_size": -1}):
        static, *_ = build_static(3, 9, 3, "relative")
        for changed in (model, static):
            changed.register_to_config(**{"sink_size": 3, "local_attn_size": 9, **changes})
        outputs = [changed(noisy, torch.zeros(2), text).sample for changed in (model, static)]
        assert torch.equal(*outputs)
        assert type(model.new_kv_cache(12)) is CausalWanKVCache


@pytest.mark.parametrize(
    "config",
    [{"sink_ema": 1.0}, {"sink_ema": 0}, {"sink_ema": 0.9, "sink_size": 0}, {"sink_ema": 0.9, "local_attn_size": -1}],
)
def test_what_cannot_be_configured(config):
    with pytest.raises(ValueError) as error:
        clips.tiny_transformer(**{"sink_size": 3, "local_attn_size": 9, **config})
    assert_one_line(error, "(0, 1)", "sink_size", "local_attn_size", "None")


@torch.no_grad()
def test_a_cache_of_another_model():
    model, _, noisy, _, text = build(3, 9, 3)
    static, *_ = build_static(3, 9, 3, "relative")
    for reader, cache in ((model, static.new_kv_cache()), (static, model.new_kv_cache())):
        with pytest.raises(ValueError) as error:
            read(reader, noisy[:, :, :3], 1000.0, text, cache)
        assert_one_line(error, "new_kv_cache", "sink_ema")
