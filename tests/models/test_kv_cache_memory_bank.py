"""Frames chosen by the text, beside sink and window, against MemFlow's loop in plain code."""

import pytest
import torch

from astrolabe_diffusers import CausalWanKVCache, CausalWanTransformer3DModel
from astrolabe_diffusers.models.kv_cache_clip import ClipKVCache
from astrolabe_diffusers.models.kv_cache_memory_bank import BANK_UPDATES
from astrolabe_diffusers.models.kv_cache_shared_past import SharedPastKVCache
from tests.models.test_transformer_causal_wan import TOLERANCE, assert_one_line, max_error, read, write
from tests.reference_memory_bank import ReferenceMemoryBank
from tests.tiny_pipeline import tiny_transformer


# Windows with and without a sink; one that is still filling when the bank is full; and no window but the block.
SHAPES = {
    "memflow": {"local_attn_size": 12, "sink_size": 3, "memory_bank_size": 3},
    "no sink": {"local_attn_size": 6, "memory_bank_size": 2, "memory_bank_interval": 2},
    "wide": {"local_attn_size": 24, "sink_size": 3, "memory_bank_size": 2, "memory_bank_interval": 1},
    "bank alone": {"local_attn_size": 3, "memory_bank_size": 3, "memory_bank_interval": 1},
    "one frame": {"local_attn_size": 7, "sink_size": 1, "memory_bank_size": 1, "memory_bank_interval": 2},
    "framewise": {"local_attn_size": 4, "sink_size": 1, "num_frames_per_block": 1, "memory_bank_size": 3},
}
FULL = {"local_attn_size": 6, "sink_size": 3, "memory_bank_size": 2, "memory_bank_interval": 1}


def build(batch_size=3, num_blocks=15, **config):
    model = tiny_transformer(**config)
    n = model.config.num_frames_per_block
    generator = torch.Generator().manual_seed(1)
    noisy, clean = (torch.randn(num_blocks, batch_size, 4, n, 2, 4, generator=generator) for _ in range(2))
    texts = torch.randn(2, batch_size, 5, 32, generator=generator)
    return model, ReferenceMemoryBank(model.state_dict(), dict(model.config)), noisy, clean, texts


def expected_of(reference, noisy, clean, texts):
    """Two noise levels of every block and its clean pass; `texts` are one a block."""
    context, outputs = reference.context_of(clean[0][:, :, :0], texts[0]), []
    for noisy_block, clean_block, text in zip(noisy, clean, texts):
        for level, latents in ((937.5, noisy_block), (500.0, noisy_block), (0.0, clean_block)):
            timestep = torch.full((len(text),), level)
            outputs.append(reference.block(latents, timestep, text, context, store=level == 0))
    return torch.stack(outputs)


def result_of(model, noisy, clean, texts, cache=None):
    cache, outputs = cache or model.new_kv_cache(), []
    for noisy_block, clean_block, text in zip(noisy, clean, texts):
        outputs += [read(model, noisy_block, level, text, cache) for level in (937.5, 500.0)]
        outputs.append(write(model, clean_block, text, cache))
    return torch.stack(outputs)


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("update", BANK_UPDATES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference(shape, update):
    """Over 15 blocks: window and bank are full and move on, and the text changes while they do."""
    model, reference, noisy, clean, texts = build(**SHAPES[shape], memory_bank_update=update)
    texts = [texts[int(block >= 11)] for block in range(15)]
    expected = expected_of(reference, noisy, clean, texts)
    assert max_error(result_of(model, noisy, clean, texts), expected) <= TOLERANCE
    if reference.size > 1:
        # The text decides, in each layer and video by itself.
        choices = {}
        for layer, video, block, left in reference.left:
            choices.setdefault((layer, video), []).append(left)
        assert len(set(map(tuple, choices.values()))) > 1
    plain = tiny_transformer(**SHAPES[shape] | {"memory_bank_size": 0})
    blind = result_of(plain, noisy[:2], clean[:2], texts)
    assert max_error(blind[:3], expected[:3]) <= TOLERANCE and max_error(blind[3:6], expected[3:6]) > 1e-3


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("update", BANK_UPDATES)
def test_copies(update):
    """Of what MemFlow's interactive pipeline does the default leaves out that a frame enters a full bank again."""
    model, _, _, clean, texts = build(**{**FULL, "memory_bank_interval": 2}, memory_bank_update=update)
    cache, num_copies = model.new_kv_cache(), 0
    for clean_block in clean:
        write(model, clean_block, texts[0], cache)
        for layer in cache.layer_caches:
            frames = layer._bank()[0].unbind(1)
            num_copies += sum(torch.equal(a, b) for a, b in zip(*frames)) if len(frames) == 2 else 0
    assert (num_copies > 0) == (update == "interactive")


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("update", BANK_UPDATES)
def test_read_leaves_no_trace(update):
    """Reads, of another text too, change neither other reads nor later blocks, bit for bit."""
    model, _, noisy, clean, texts = build(num_blocks=8, **FULL, memory_bank_update=update)
    disturbed, quiet = model.new_kv_cache(), model.new_kv_cache()
    seen = []
    for noisy_block, clean_block in zip(noisy, clean):
        first = read(model, noisy_block, 1000.0, texts[0], disturbed)
        seen.append((read(model, noisy_block, 1000.0, texts[1], disturbed) - first).abs().max())
        assert torch.equal(read(model, noisy_block, 1000.0, texts[0], disturbed), first)
        a, b = (write(model, clean_block, texts[0], cache) for cache in (disturbed, quiet))
        assert torch.equal(a, b)
    assert min(seen) > 1e-2


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("shape", ["memflow", "no sink"])
def test_storing_alone_and_kept_text(shape):
    """`"store"`, and text whose keys the cache keeps, give what `"write"` and new keys do."""
    model, _, noisy, clean, texts = build(**SHAPES[shape])
    expected = result_of(model, noisy, clean, [texts[0]] * 15)
    cache, outputs = model.new_kv_cache(), []
    for noisy_block, clean_block in zip(noisy, clean):
        cache.set_text(texts[0])
        outputs += [read(model, noisy_block, level, texts[0], cache) for level in (937.5, 500.0)]
        assert read(model, clean_block, 0.0, texts[0], cache, mode="store") is None
        assert not cache.can_pair(clean_block.shape[2], model.config)
    assert max_error(torch.stack(outputs), expected.unflatten(0, (-1, 3))[:, :2].flatten(0, 1)) <= TOLERANCE


@pytest.mark.usefixtures("no_grad")
def test_fused_projections():
    model, _, noisy, clean, texts = build(num_blocks=8, **FULL)
    expected = result_of(model, noisy, clean, [texts[0]] * 8)
    model.fuse_qkv_projections()
    assert max_error(result_of(model, noisy, clean, [texts[0]] * 8), expected) <= TOLERANCE


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("at", [2, 5])
@pytest.mark.parametrize("update", BANK_UPDATES)
def test_select(update, at):
    """Two of three videos go on as they would have, and alone as in the batch."""
    model, _, noisy, clean, texts = build(num_blocks=8, **FULL, memory_bank_update=update)
    cache = model.new_kv_cache()
    expected = result_of(model, noisy, clean, [texts[0]] * 8).unflatten(0, (-1, 3))
    result_of(model, noisy[:at], clean[:at], [texts[0]] * at, cache)
    for videos in ([2, 0], [1]):
        some = cache.select(videos)
        blocks = noisy[at:, videos], clean[at:, videos], [texts[0][videos]] * (8 - at)
        result = result_of(model, *blocks, some).unflatten(0, (-1, 3))
        assert max_error(result, expected[at:, :, videos]) <= TOLERANCE
    # What was taken from is whole.
    result = result_of(model, noisy[at:], clean[at:], [texts[0]] * (8 - at), cache).unflatten(0, (-1, 3))
    assert max_error(result, expected[at:]) <= TOLERANCE


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize(
    "shape, num_past",
    [("memflow", 10), ("no sink", 2), ("no sink", 7), ("wide", 1), ("wide", 4), ("one frame", 5), ("framewise", 1)],
)
def test_shared_past(shape, num_past):
    """Videos that go on from one, with their own texts, against a cache each; twice, for the past stays as it is."""
    model, _, noisy, clean, texts = build(num_blocks=num_past + 5, **SHAPES[shape])
    clean[:num_past] = clean[:num_past, :1]
    text = [texts[0][:1].expand(3, -1, -1)] * num_past + [texts[1]] * 5
    expected = result_of(model, noisy, clean, text).unflatten(0, (-1, 3))[num_past:]
    past = model.new_kv_cache()
    for clean_block in clean[:num_past]:
        write(model, clean_block[:1], texts[0][:1], past)
    for _ in range(2):
        cache = SharedPastKVCache(past, 3, None)
        result = result_of(model, noisy[num_past:], clean[num_past:], text[num_past:], cache)
        assert max_error(result.unflatten(0, (-1, 3)), expected) <= TOLERANCE


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("update", BANK_UPDATES)
def test_gradients_equal_those_of_the_reference(update, checkpointing):
    """The bank is constant context, as the cache is: plain autograd through the reference, block by block."""
    model, _, noisy, clean, texts = build(2, 8, **FULL, memory_bank_update=update)
    if checkpointing:
        model.enable_gradient_checkpointing()
    names = [name for name, _ in model.named_parameters()]
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for name in names:
        weights[name] = weights[name].detach().requires_grad_()
    reference = ReferenceMemoryBank(weights, dict(model.config))
    reference.weights = weights
    context, cache = reference.context_of(clean[0][:, :, :0], texts[0]), model.new_kv_cache()
    timestep, direction = torch.full((2,), 625.0), torch.randn(2, 4, 3, 2, 4)
    for block in range(8):
        for step in (1, 2):
            output = read(model, noisy[block], 625.0, texts[0], cache)
            (output * direction).sum().backward()
            expected = reference.block(noisy[block], timestep, texts[0], context, store=False)
            (expected * direction).sum().backward()
        with torch.no_grad():
            write(model, clean[block], texts[0], cache)
            reference.block(clean[block], torch.zeros(2), texts[0], context, store=True)
    for name, parameter in model.named_parameters():
        wanted = weights[name].grad
        assert max_error(parameter.grad, wanted) <= 2e-5 * (1 + wanted.abs().max()), name


@pytest.mark.usefixtures("no_grad")
def test_past_weight():
    """The bank's frames are past ones."""
    model, reference, noisy, clean, texts = build(1, 1, **FULL)
    cache = model.new_kv_cache(past_weight=0.3)
    for block in range(4):
        write(model, clean[0] + block, texts[0], cache)
    read(model, noisy[0], 500.0, texts[0], cache)
    mask = cache.attention_mask(6, "cpu", torch.float32)
    # Two frames of the bank and the sink's second and third; not the video's first frame and the block itself.
    assert mask.shape[-1] == 2 * (2 + 3) + 6
    assert (mask[..., :8] < -1).all() and (mask[..., 8:] == 0).all()


@pytest.mark.usefixtures("no_grad")
def test_clear_starts_a_new_video():
    model, _, noisy, clean, texts = build(num_blocks=8, **FULL)
    cache = model.new_kv_cache()
    first = result_of(model, noisy, clean, [texts[0]] * 8, cache)
    cache.clear()
    other = [x[..., :2] for x in (noisy, clean)]
    assert torch.equal(
        result_of(model, *other, [texts[1]] * 8, cache), result_of(model, *other, [texts[1]] * 8)
    )
    cache.clear()
    assert torch.equal(result_of(model, noisy, clean, [texts[0]] * 8, cache), first)


@pytest.mark.usefixtures("no_grad")
def test_memory_does_not_grow():
    model, _, noisy, clean, texts = build(num_blocks=8, **FULL)
    cache, sizes = model.new_kv_cache(), []
    for noisy_block, clean_block in zip(noisy, clean):
        read(model, noisy_block, 500.0, texts[0], cache)
        write(model, clean_block, texts[0], cache)
        layer = cache.get(0)
        tensors = [layer.key, layer.value, layer._newest, layer._choice, layer._text_key, *layer._spare]
        sizes.append(sum(x.untyped_storage().nbytes() for x in tensors if x is not None))
    assert len(set(sizes[3:])) == 1
    frame = 2 * clean[0][:, 0, 0, ::2, ::2].numel() * 24 * 4  # keys and values of all videos
    # Three slots and the workspace, the bank, the spare frame; and tokens in front, places and the text's mean key.
    assert sizes[-1] < (3 + 3 + 2 + 1 + 1) * frame


def test_configuration(tmp_path):
    config = {**SHAPES["memflow"], "memory_bank_update": "interactive"}
    tiny_transformer(**config).save_pretrained(tmp_path)
    model = CausalWanTransformer3DModel.from_pretrained(tmp_path)
    assert {name: model.config[name] for name in config} == config and not model.packs_clips


@pytest.mark.parametrize(
    "config, words",
    [
        ({"memory_bank_size": -1}, ["memory_bank_size", "at least 0"]),
        ({**FULL, "memory_bank_interval": 0}, ["memory_bank_interval", "at least 1"]),
        ({**FULL, "memory_bank_update": "always"}, ["memory_bank_update", *BANK_UPDATES]),
        ({**FULL, "local_attn_size": -1}, ["memory_bank_size=2", "local_attn_size"]),
        ({**FULL, "rope_mode": "relative"}, ["memory_bank_size=2", "rope_mode='absolute'"]),
    ],
)
def test_what_a_user_gets_wrong(config, words):
    with pytest.raises(ValueError) as error:
        tiny_transformer(**config)
    assert_one_line(error, *words)


@pytest.mark.parametrize("cache", [None, CausalWanKVCache(2), ClipKVCache(2)])
def test_needs_a_cache_with_a_bank(cache):
    model, _, noisy, _, texts = build(1, 1, **FULL)
    arguments = {} if cache is None else {"kv_cache": cache, "kv_cache_mode": "read"}
    with pytest.raises(ValueError) as error:
        model(noisy[0], torch.zeros(1), texts[0], **arguments)
    assert_one_line(error, "memory bank", "new_kv_cache")
