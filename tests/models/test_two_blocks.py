"""Two blocks in one pass, and a pass that only stores: the cache modes `"store+read"` and `"store"`."""

import copy

import pytest
import torch
from peft import LoraConfig

from astrolabe_diffusers.models.transformer_causal_wan import CausalWanTransformerBlock
from tests.models.test_transformer_causal_wan import (
    TOLERANCE,
    WINDOWS,
    assert_one_line,
    blocks_of,
    build,
    max_error,
    new_cache,
    read,
    write,
)


pytestmark = pytest.mark.usefixtures("no_grad")


def pair(model, clean_block, noisy_block, timestep, text, cache, **kwargs):
    """Both in one pass; what the noisy one gives."""
    timestep = torch.full((len(text),), timestep)
    blocks = torch.cat([clean_block, noisy_block], dim=2)
    arguments = {"kv_cache": cache, "kv_cache_mode": "store+read", "frame_offset": cache.num_frames}
    return model(blocks, timestep, text, return_dict=False, **arguments, **kwargs)[0]


def longer(video, times=2):
    """Other frames after the given ones, so that every window moves on."""
    return torch.cat([video, *(video.flip(2).roll(i, dims=4) for i in range(1, times))], dim=2)


def go_on(model, noisy, clean, text, cache, n, paired=True, **kwargs):
    """Every block is read, and once more when the next one has not come yet: `(outputs, number of pairs)`."""
    outputs, pairs = [], 0
    blocks = list(zip(blocks_of(clean, n), blocks_of(noisy, n)))
    outputs.append(read(model, blocks[0][1], 1000.0, text, cache))
    for (clean_block, _), (_, noisy_block) in zip(blocks, blocks[1:]):
        if paired and cache.can_pair(n, model.config):
            pairs += 1
            outputs.append(pair(model, clean_block, noisy_block, 937.5, text, cache, **kwargs))
        else:
            write(model, clean_block, text, cache)
            outputs.append(read(model, noisy_block, 937.5, text, cache))
        outputs.append(read(model, noisy_block, 500.0, text, cache))
    return outputs, pairs


def num_pairs(reference, n, num_blocks):
    """Of the passes that store a block, those that can read the next: it sees all of the stored one and, of what that
    sees, everything or all but as many frames."""
    count = 0
    for stored in range(0, n * (num_blocks - 1), n):
        first, second = (set(reference.visible_frames(stored + i * n)) for i in (1, 2))
        count += second >= set(range(stored, stored + n)) and len(first - second) in (0, n)
    return count


@pytest.mark.parametrize("rope_mode", ["absolute", "relative"])
@pytest.mark.parametrize("n, window, sink", [*WINDOWS, (3, 12, 3), (2, 8, 2), (1, 6, 3), (3, 10, 1)])
def test_pairs_equal_the_reference(n, window, sink, rope_mode):
    check_pairs(*build(n, window, sink, rope_mode), n)


def check_pairs(model, reference, noisy, clean, text, n):
    """A video by pairs of blocks is the reference's, which makes them one by one."""
    noisy, clean = longer(noisy), longer(clean)
    cache, context = model.new_kv_cache(clean.shape[2]), reference.context_of(clean[:, :, :0], text)
    outputs, pairs = go_on(model, noisy, clean, text, cache, n)
    assert pairs == num_pairs(reference, n, clean.shape[2] // n)
    expected = []
    for i, (clean_block, noisy_block) in enumerate(zip(blocks_of(clean, n), blocks_of(noisy, n))):
        for timestep in (937.5, 500.0) if i else (1000.0,):
            times = torch.full((len(text),), timestep)
            expected.append(reference.block(noisy_block, times, text, context, store=False))
        reference.block(clean_block, torch.zeros(len(text)), text, context, store=True)
    for output, wanted in zip(outputs, expected, strict=True):
        assert max_error(output, wanted) <= TOLERANCE


@pytest.mark.parametrize("n, window, sink", [(3, -1, 0), (2, 6, 0), (3, 9, 3)])
def test_bfloat16_is_as_exact(n, window, sink):
    """No further from float32 than two passes are."""
    errors = {True: [], False: []}
    for seed in range(4):
        model, _, noisy, clean, text = build(n, window, sink, seed=seed)
        noisy, clean = longer(noisy), longer(clean)
        wanted, _ = go_on(model, noisy, clean, text, new_cache(model, clean.shape[2]), n, paired=False)
        half = copy.deepcopy(model).to(torch.bfloat16)
        inputs = [x.to(torch.bfloat16) for x in (noisy, clean, text)]
        for paired in errors:
            outputs, pairs = go_on(half, *inputs, new_cache(half, clean.shape[2]), n, paired)
            assert (pairs > 2) == paired
            errors[paired] += [(a.float() - b).norm() / b.norm() for a, b in zip(outputs, wanted)]
    paired, plain = (torch.stack(errors[key]) for key in (True, False))
    assert plain.mean() > 1e-3 and paired.mean() <= 1.05 * plain.mean()


def test_with_a_lora_and_its_scale():
    model, _, noisy, clean, text = build(3, 9, 3)
    modules = ["to_q", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=modules))
    blocks = blocks_of(clean, 3)
    results = {}
    for scale in (1.0, 0.3):
        paired, plain, kwargs = new_cache(model), new_cache(model), {"attention_kwargs": {"scale": scale}}
        for clean_block, noisy_block in zip(blocks, blocks_of(noisy, 3)[1:]):
            results[scale] = pair(model, clean_block, noisy_block, 937.5, text, paired, **kwargs)
            arguments = {"kv_cache": plain, "frame_offset": plain.num_frames, **kwargs}
            model(clean_block, torch.zeros(2), text, kv_cache_mode="store", **arguments)
            arguments["frame_offset"] = plain.num_frames
            times = torch.full((2,), 937.5)
            expected = model(noisy_block, times, text, kv_cache_mode="read", **arguments).sample
            assert max_error(results[scale], expected) <= TOLERANCE
    assert max_error(results[1.0], results[0.3]) > 1e-2


def test_fused_projections():
    model, _, noisy, clean, text = build(3, 9, 3)
    expected, _ = go_on(model, noisy, clean, text, new_cache(model), 3)
    model.fuse_qkv_projections()
    outputs, pairs = go_on(model, noisy, clean, text, new_cache(model), 3)
    assert pairs == 3
    for output, wanted in zip(outputs, expected):
        assert max_error(output, wanted) <= TOLERANCE


def test_blocks_that_add_to_their_input():
    """A block of a user's own, as in docs/customise.md, gets from ours as many tokens as it passes on."""

    class Mixed(CausalWanTransformerBlock):
        def forward(self, hidden_states, *args, **kwargs):
            return 0.1 * hidden_states + 0.9 * super().forward(hidden_states, *args, **kwargs)

    model, _, noisy, clean, text = build(3, 9, 3)
    for block in model.blocks:
        block.__class__ = Mixed
    expected, _ = go_on(model, noisy, clean, text, new_cache(model), 3, paired=False)
    outputs, pairs = go_on(model, noisy, clean, text, new_cache(model), 3)
    assert pairs == 3
    for output, wanted in zip(outputs, expected):
        assert max_error(output, wanted) <= TOLERANCE


@pytest.mark.parametrize("n, window, sink", [(3, -1, 0), (2, 5, 1), (3, 9, 3)])
def test_storing_alone(n, window, sink):
    """The cache is that of `"write"`, bit for bit, and of the last layer only keys and values were computed."""
    model, _, noisy, clean, text = build(n, window, sink)
    called = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    written, stored = new_cache(model, clean.shape[2]), new_cache(model, clean.shape[2])
    for clean_block, noisy_block in zip(blocks_of(clean, n), blocks_of(noisy, n)):
        assert write(model, clean_block, text, written) is not None
        called.clear()
        assert read(model, clean_block, 0.0, text, stored, mode="store") is None
        last = {name for name in called if name.startswith("blocks.1.")}
        assert last == {f"blocks.1.{name}" for name in STORED} and "blocks.0.ffn" in called
        assert "proj_out" not in called
        if stored.num_frames < clean.shape[2]:
            flows = [read(model, noisy_block, 500.0, text, cache) for cache in (stored, written)]
            assert torch.equal(*flows)
    arguments = {"kv_cache": new_cache(model, n), "kv_cache_mode": "store"}
    assert model(blocks_of(clean, n)[0], torch.zeros(len(text)), text, **arguments).sample is None


STORED = ("modulation", "norm1", "attn1", "attn1.to_k", "attn1.to_v", "attn1.norm_k")


def test_the_last_layer_of_a_pair():
    """Its queries, text and feed-forward are the second block's alone."""
    model, _, noisy, clean, text = build(3)
    tokens = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, args, output, name=name: tokens.update({name: args[0].shape[1]}))
    pair(model, clean[:, :, :3], noisy[:, :, 3:6], 937.5, text, new_cache(model, 12))
    assert tokens["blocks.0.ffn.net.2"] == tokens["blocks.0.attn2.to_q"] == tokens["blocks.1.attn1.to_k"] == 12
    assert tokens["blocks.1.ffn.net.2"] == tokens["blocks.1.attn2.to_q"] == tokens["blocks.1.attn1.to_out.0"] == 6
    assert tokens["proj_out"] == 6


def test_text_is_projected_once():
    model, _, noisy, clean, text = build(3, 9, 3)
    calls = []
    for block in model.blocks:
        block.attn2.to_k.register_forward_hook(lambda *_: calls.append(1))
    cache = new_cache(model)
    cache.set_text(text)
    go_on(model, noisy, clean, text, cache, 3)
    assert len(calls) == len(model.blocks)


@pytest.mark.parametrize("rope_mode", ["absolute", "relative"])
@pytest.mark.parametrize("n, window, sink", [(3, -1, 0), (1, 4, 2), (3, 9, 3)])
def test_memory(n, window, sink, rope_mode):
    """Allocated once. Who does not pack has no margin; a model that remembers all needs none."""
    model, _, noisy, clean, text = build(n, window, sink, rope_mode)
    frame_tokens = clean.shape[3] * clean.shape[4] // 4
    noisy, clean = longer(noisy), longer(clean)
    frames = {}
    for packs in (True, False):
        cache = new_cache(model, clean.shape[2])
        pointers = set()
        for clean_block, noisy_block in zip(blocks_of(clean, n), blocks_of(noisy, n)[1:]):
            if packs:
                pair(model, clean_block, noisy_block, 937.5, text, cache)
            else:
                write(model, clean_block, text, cache)
            pointers.add(cache.get(0).key.data_ptr())
        assert len(pointers) == 1
        frames[packs] = cache.get(0).key.shape[1] // frame_tokens
    assert frames[False] == (clean.shape[2] if window == -1 else window)
    margin = 0 if window == -1 else n + sink * (rope_mode == "relative")
    assert frames[True] - frames[False] == margin


@pytest.mark.parametrize("rope_mode", ["absolute", "relative"])
@pytest.mark.parametrize("first_pair", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("n, window, sink", [(2, 6, 0), (3, 9, 3)])
def test_a_first_pair_that_comes_late(n, window, sink, first_pair, rope_mode):
    """After blocks that were stored by themselves, as given ones are, the margin is added once."""
    model, _, noisy, clean, text = build(n, window, sink, rope_mode)
    noisy, clean = longer(noisy), longer(clean)
    paired, plain, sizes = new_cache(model), new_cache(model), set()
    for i, (clean_block, noisy_block) in enumerate(zip(blocks_of(clean, n), blocks_of(noisy, n)[1:])):
        write(model, clean_block, text, plain)
        expected = read(model, noisy_block, 937.5, text, plain)
        if i < first_pair:
            write(model, clean_block, text, paired)
            assert paired.get(0).key.shape == plain.get(0).key.shape
        else:
            assert paired.can_pair(n, model.config)
            assert max_error(pair(model, clean_block, noisy_block, 937.5, text, paired), expected) <= TOLERANCE
            sizes.add(paired.get(0).key.shape[1])
        assert max_error(read(model, noisy_block, 937.5, text, paired), expected) <= TOLERANCE
    margin = n + sink * (rope_mode == "relative")
    assert sizes == {plain.get(0).key.shape[1] * (window + margin) // window}


def test_a_cache_that_is_written_anew_keeps_its_margin():
    model, _, noisy, clean, text = build(3, 9, 3)
    cache = new_cache(model)
    blocks = list(zip(blocks_of(clean, 3), blocks_of(noisy, 3)[1:]))
    pair(model, *blocks[0], 937.5, text, cache)
    size = cache.get(0).key.shape[1]
    cache.rewind(0, num_kept=0)
    write(model, clean[:, :, :3], text, cache)
    outputs = [pair(model, *block, 937.5, text, cache) for block in blocks[1:]]
    assert cache.get(0).key.shape[1] == size
    cache.clear()
    write(model, clean[:, :, :3], text, cache)
    for (clean_block, noisy_block), output in zip(blocks[1:], outputs):
        write(model, clean_block, text, cache)
        assert max_error(read(model, noisy_block, 937.5, text, cache), output) <= TOLERANCE
    assert cache.get(0).key.shape[1] < size


def test_some_videos_of_a_batch_go_on():
    model, _, noisy, clean, text = build(3, 9, 3, "relative")
    noisy, clean = longer(noisy), longer(clean)
    cache = new_cache(model)
    blocks = list(zip(blocks_of(clean, 3), blocks_of(noisy, 3)[1:]))
    for clean_block, noisy_block in blocks[:4]:
        pair(model, clean_block, noisy_block, 937.5, text, cache)
    alone = cache.select([1])
    for clean_block, noisy_block in blocks[4:]:
        expected = pair(model, clean_block, noisy_block, 937.5, text, cache)
        result = pair(model, clean_block[1:], noisy_block[1:], 937.5, text[1:], alone)
        assert max_error(result, expected[1:]) <= TOLERANCE


# What cannot be paired


@pytest.mark.parametrize("why", ["gradients", "past_weight", "a window of one block", "too many frames"])
def test_what_needs_two_passes(why):
    model, _, noisy, clean, text = build(3, 3 if why == "a window of one block" else -1)
    cache = new_cache(model, 12)
    if why == "past_weight":
        cache.past_weight = 0.5
    write(model, clean[:, :, :3], text, cache)
    n = 4 if why == "too many frames" else 3
    with torch.set_grad_enabled(why == "gradients"), pytest.raises(ValueError) as error:
        assert n == 4 or not cache.can_pair(n, model.config)
        pair(model, clean[:, :, :n], noisy[:, :, :n], 937.5, text, cache)
    assert_one_line(error, f"of {n} latent frames")
