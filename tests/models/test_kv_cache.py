"""What a CausalWanKVCache keeps, where, and for how long."""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.test_transformer_causal_wan import (
    TOLERANCE,
    assert_one_line,
    blocks_of,
    build,
    max_error,
    new_cache,
    read,
    write,
)


pytestmark = pytest.mark.usefixtures("no_grad")


def buffers(cache):
    return [tensor for layer in cache.layer_caches for tensor in (layer.key, layer.value)]


@pytest.mark.parametrize("rope_mode", ["absolute", "relative"])
@pytest.mark.parametrize("n, window, sink", [(1, 4, 2), (2, -1, 0), (3, 8, 1)])
def test_read_leaves_no_trace(n, window, sink, rope_mode):
    """Noisy reads in between change neither other reads nor later blocks, bit for bit."""
    model, _, noisy, clean, text = build(n, window, sink, rope_mode)
    clean = torch.cat([clean, clean.flip(2)], dim=2)
    noisy = torch.cat([noisy, noisy.flip(2)], dim=2)
    disturbed, quiet = new_cache(model, clean.shape[2]), new_cache(model, clean.shape[2])
    for noisy_block, clean_block in zip(blocks_of(noisy, n), blocks_of(clean, n)):
        frames = disturbed.num_frames
        first = read(model, noisy_block, 1000.0, text, disturbed)
        read(model, 100 * torch.randn_like(noisy_block), 250.0, text, disturbed)
        assert torch.equal(read(model, noisy_block, 1000.0, text, disturbed), first)
        assert disturbed.num_frames == frames
        a, b = write(model, clean_block, text, disturbed), write(model, clean_block, text, quiet)
        assert torch.equal(a, b)
        assert disturbed.num_frames == frames + n


@pytest.mark.parametrize("n, window, sink", [(1, 4, 2), (2, -1, 0), (3, 8, 1)])
def test_storage_is_allocated_once(n, window, sink):
    """One allocation, no larger than the window, and a stored frame stays where it is until its slot is reused."""
    model, _, noisy, clean, text = build(n, window, sink)
    clean = torch.cat([clean] * 3, dim=2)
    frames, frame_tokens = clean.shape[2], clean.shape[3] * clean.shape[4] // 4
    longest = frames if window == -1 else window
    cache = new_cache(model, max_frames=frames)
    pointers = snapshot = None
    for clean_block in blocks_of(clean, n):
        read(model, torch.randn_like(clean_block), 1000.0, text, cache)
        write(model, clean_block, text, cache)
        current = [(tensor.data_ptr(), tensor.shape) for tensor in buffers(cache)]
        assert pointers is None or current == pointers
        pointers = current
        for i, tensor in enumerate(buffers(cache)):
            assert tensor.shape[1] <= longest * frame_tokens
            if snapshot is not None:
                # Bits, not values: slots that nothing was written to may hold NaN.
                different = tensor.view(torch.int32) != snapshot[i].view(torch.int32)
                changed = different.flatten(2).any(2).any(0).sum().item()
                # This block's frames, and as many of scratch space.
                assert changed <= 2 * n * frame_tokens
        snapshot = [tensor.clone() for tensor in buffers(cache)]


def test_layers_get_their_storage_together():
    """Nothing is computed between two of them, so that none lies in a hole between what a pass of blocks needs."""
    model, _, _, clean, text = build(1, 4, 2)
    cache, operators = new_cache(model), []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            operators.append(result)  # kept: memory that is freed would be given out again
            return result

    with Recorder():
        write(model, blocks_of(clean, 1)[0], text, cache)
    storages = [x.untyped_storage().data_ptr() if isinstance(x, torch.Tensor) else None for x in operators]
    first_seen = [storages.index(buffer.untyped_storage().data_ptr()) for buffer in buffers(cache)]
    views = 2  # of each, its own slice included
    assert len(first_seen) > 2 and first_seen[-1] - first_seen[0] <= views * (len(first_seen) - 1)


def test_clear_starts_a_new_video():
    """After `clear` another video, of another resolution and batch size, comes out as from a new cache."""
    model, _, noisy, clean, text = build(2, 4, 2, "relative")
    cache = new_cache(model)
    for block in blocks_of(clean, 2):
        write(model, block, text, cache)
    cache.clear()
    assert cache.num_frames == 0
    other, other_text = torch.randn(3, 4, 8, 4, 6), torch.randn(3, 7, 32)
    fresh = new_cache(model)
    for block in blocks_of(other, 2):
        assert torch.equal(write(model, block, other_text, cache), write(model, block, other_text, fresh))


def test_text_is_kept_where_it_is_set():
    """Set once, the text is projected in the first pass only; another tensor is not taken for it."""
    model, _, noisy, clean, text = build(2, 4, 2)
    calls = []
    model.blocks[0].attn2.to_k.register_forward_hook(lambda *_: calls.append(1))
    cache, plain = new_cache(model), new_cache(model)
    cache.set_text(text)
    for block in blocks_of(clean, 2)[:3]:
        assert torch.equal(read(model, block, 1000.0, text, cache), read(model, block, 1000.0, text, plain))
        assert torch.equal(write(model, block, text, cache), write(model, block, text, plain))
    assert len(calls) == 1 + 6

    other, block = torch.randn_like(text), noisy[:, :, 6:8]
    old = read(model, block, 1000.0, text, cache)
    assert len(calls) == 7
    assert torch.equal(read(model, block, 1000.0, text.clone(), cache), old)
    assert max_error(read(model, block, 1000.0, other, cache), old) > 1e-2
    assert torch.equal(read(model, block, 1000.0, text, cache), old)
    assert len(calls) == 9
    cache.set_text(other)
    assert torch.equal(read(model, block, 1000.0, other, cache), read(model, block, 1000.0, other, plain))


def test_no_text_outlives_its_weights():
    """New weights are seen at once where no text is set, and from the next `set_text` on where one is."""
    model, _, noisy, _, text = build(2)
    block, cache, kept = noisy[:, :, :2], new_cache(model, 4), new_cache(model, 4)
    kept.set_text(text)
    before = [read(model, block, 1000.0, text, c) for c in (cache, kept)]
    model.blocks[0].attn2.to_k.weight.mul_(-1)
    after = read(model, block, 1000.0, text, cache)
    assert max_error(after, before[0]) > 1e-3
    kept.set_text(text)
    assert torch.equal(read(model, block, 1000.0, text, kept), after)


def test_gradients_reach_the_text():
    """A text that is kept carries no graph: with gradients it is projected anew."""
    model, _, noisy, _, text = build(2)
    cache = new_cache(model, 4)
    cache.set_text(text)
    read(model, noisy[:, :, :2], 1000.0, text, cache)
    with torch.enable_grad():
        read(model, noisy[:, :, :2], 1000.0, text, cache).sum().backward()
    assert model.blocks[0].attn2.to_k.weight.grad.abs().max() > 0


def test_new_prompt_keeps_the_old_frames():
    """A prompt change in mid-video: the frames so far keep the K/V that the old prompt gave them."""
    model, reference, noisy, clean, text = build(3, 9, 3)
    new_text = torch.randn_like(text)
    cache, context = new_cache(model), reference.context_of(clean[:, :, :0], text)
    for i, block in enumerate(blocks_of(clean, 3)):
        prompt = text if i < 2 else new_text
        cache.set_text(prompt)
        expected = reference.block(block, torch.zeros(2), prompt, context, store=True)
        assert max_error(write(model, block, prompt, cache), expected) <= TOLERANCE


def test_two_videos_at_once():
    """The state is in the caches alone: two videos in turns come out as one after the other."""
    model, _, noisy, clean, text = build(1, 4, 2, "relative")
    other, other_text = torch.randn(1, 4, 6, 6, 4), torch.randn(1, 9, 32)
    alone = []
    for video, prompt in ((clean, text), (other, other_text)):
        cache = new_cache(model)
        alone.append([write(model, block, prompt, cache) for block in blocks_of(video, 1)])
    cache, other_cache = new_cache(model), new_cache(model)
    for i in range(6):
        assert torch.equal(write(model, clean[:, :, i : i + 1], text, cache), alone[0][i])
        assert torch.equal(write(model, other[:, :, i : i + 1], other_text, other_cache), alone[1][i])


def test_memory_is_freed_at_once():
    model, _, _, clean, text = build(2)
    cache = new_cache(model, max_frames=4)
    write(model, blocks_of(clean, 2)[0], text, cache)
    keys = weakref.ref(cache.get(0).key)
    gc.disable()
    try:
        del cache
        assert keys() is None
    finally:
        gc.enable()


def test_interface():
    model, *_ = build(2)
    cache = new_cache(model)
    assert len(cache.layer_caches) == model.config.num_layers
    assert cache.get(1) is cache.layer_caches[1]
    assert cache.num_frames == 0


# Errors


def test_unlimited_window_needs_max_frames():
    model, _, noisy, _, text = build(3)
    with pytest.raises(ValueError) as error:
        write(model, noisy[:, :, :3], text, new_cache(model))
    assert_one_line(error, "max_frames")


def test_max_frames_is_a_bound():
    model, _, noisy, _, text = build(3)
    cache = new_cache(model, max_frames=7)
    for block in blocks_of(noisy, 3)[:2]:
        write(model, block, text, cache)
    for mode in ("read", "write"):
        with pytest.raises(ValueError) as error:
            read(model, noisy[:, :, 6:9], 0.0, text, cache, mode=mode)
        assert_one_line(error, "max_frames", 7)


def test_one_cache_serves_one_shape():
    model, _, noisy, _, text = build(3)
    cache = new_cache(model, max_frames=9)
    write(model, noisy[:, :, :3], text, cache)
    with pytest.raises(ValueError) as error:
        read(model, torch.randn(2, 4, 3, 4, 4), 0.0, text, cache)
    assert_one_line(error)
    with pytest.raises(ValueError) as error:
        read(model, noisy[:1, :, :3], 0.0, text[:1], cache)
    assert_one_line(error)
    with pytest.raises(ValueError) as error:
        read(model, noisy[:, :, :4], 0.0, text, cache)
    assert_one_line(error, 4, "3 at most")
    assert read(model, noisy[:, :, :2], 0.0, text, cache).shape[2] == 2


def test_clean_frames_and_cache_exclude_each_other():
    model, _, noisy, clean, text = build(3)
    with pytest.raises(ValueError) as error:
        model(
            noisy[:, :, :3],
            torch.zeros(2),
            text,
            kv_cache=new_cache(model, 9),
            kv_cache_mode="read",
            clean_hidden_states=clean[:, :, :3],
        )
    assert_one_line(error, "clean_hidden_states", "kv_cache")
