"""CausalWanTransformer3DModel against diffusers' own Wan and against the slow reference."""

import json
from inspect import signature

import pytest
import torch
from diffusers import PyramidAttentionBroadcastConfig, WanTransformer3DModel
from peft import LoraConfig

from astrolabe_diffusers import CausalWanKVCache, CausalWanTransformer3DModel
from tests.models.test_reference_causal_wan import BASE, max_error, stock_wan
from tests.reference_causal_wan import ReferenceCausalWan
from tests.tiny_pipeline import tiny_transformer


TOLERANCE = 1e-5
LEVELS = (1000.0, 937.5, 833.3333, 625.0, 317.4, 0.0)
MODEL_ONLY = signature(CausalWanTransformer3DModel).parameters.keys() - signature(WanTransformer3DModel).parameters

# Frames in a block -> model configuration and latent shape (batch, channels, frames, height, width).
SETTINGS = {
    1: (dict(), (3, 4, 6, 4, 6)),
    2: (dict(num_attention_heads=3, attention_head_dim=20), (1, 4, 8, 6, 2)),
    3: (dict(num_attention_heads=1, attention_head_dim=32, ffn_dim=48, out_channels=6), (2, 4, 12, 2, 4)),
}
# (frames in a block, window, sink): unlimited, aligned and unaligned, smallest windows, sinks of part of a block.
WINDOWS = [
    (1, -1, 0),
    (1, 3, 0),
    (1, 4, 2),
    (2, -1, 0),
    (2, 4, 2),
    (2, 5, 1),
    (3, -1, 0),
    (3, 3, 0),
    (3, 9, 3),
    (3, 8, 1),
]


def build(n, window=-1, sink=0, rope_mode="absolute", seed=0, **config):
    """A model, its reference, and matching noisy latents, clean latents and text."""
    settings, shape = SETTINGS[n]
    model = tiny_transformer(
        seed, **settings, num_frames_per_block=n, local_attn_size=window, sink_size=sink, rope_mode=rope_mode, **config
    )
    reference = ReferenceCausalWan(model.state_dict(), dict(model.config))
    generator = torch.Generator().manual_seed(seed + 1)
    noisy, clean = (torch.randn(shape, generator=generator) for _ in range(2))
    text = torch.randn(shape[0], 5, model.config.text_dim, generator=generator)
    return model, reference, noisy, clean, text


def new_cache(model, max_frames=None):
    return CausalWanKVCache(model.config.num_layers, max_frames=max_frames)


def read(model, block, timestep, text, cache, mode="read"):
    """One block through the cache; `timestep` is a number or a tensor."""
    if not torch.is_tensor(timestep):
        timestep = torch.full((block.shape[0],), float(timestep))
    return model(
        block, timestep, text, kv_cache=cache, kv_cache_mode=mode, frame_offset=cache.num_frames, return_dict=False
    )[0]


def write(model, block, text, cache):
    return read(model, block, 0.0, text, cache, mode="write")


def blocks_of(video, n):
    return video.split(n, dim=2)


def assert_one_line(error, *words):
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message


@torch.no_grad()
@pytest.mark.parametrize("n", SETTINGS)
def test_one_block_equals_stock_wan(n):
    settings, shape = SETTINGS[n]
    model = tiny_transformer(**settings, num_frames_per_block=shape[2])
    stock_config = {k: v for k, v in model.config.items() if k not in MODEL_ONLY and not k.startswith("_")}
    stock = stock_wan(stock_config, model.state_dict())
    latents, text = torch.randn(shape), torch.randn(shape[0], 5, model.config.text_dim)
    for timestep in LEVELS:
        timestep = timestep - torch.arange(shape[0]).clamp(max=int(timestep)) * 3.7
        expected = stock(latents, timestep, text).sample
        assert max_error(model(latents, timestep, text).sample, expected) <= TOLERANCE
        cache = new_cache(model, max_frames=shape[2])
        assert max_error(read(model, latents, timestep, text, cache), expected) <= TOLERANCE


def test_outputs_depend_on_every_input():
    """Guards the equalities of this file: they would hold trivially for a model that is blind to an input."""
    model, _, noisy, clean, text = build(2)
    timestep = torch.full((1,), 500.0)
    with torch.no_grad():
        base = model(noisy, timestep, text, clean_hidden_states=clean).sample
        changes = {
            "text": model(noisy, timestep, torch.randn_like(text), clean_hidden_states=clean).sample,
            "time": model(noisy, timestep - 50, text, clean_hidden_states=clean).sample,
            "context": model(noisy, timestep, text, clean_hidden_states=torch.randn_like(clean)).sample,
        }
    assert 0.3 < base.std() < 10
    for name, changed in changes.items():
        last = (changed - base)[:, :, -1].std()
        assert last > 0.05, f"{name} changes the output by {last}"


@torch.no_grad()
@pytest.mark.parametrize("rope_mode", ["absolute", "relative"])
@pytest.mark.parametrize("n, window, sink", WINDOWS)
def test_whole_video_equals_reference(n, window, sink, rope_mode):
    model, reference, noisy, clean, text = build(n, window, sink, rope_mode)
    timestep = torch.rand(noisy.shape[0], noisy.shape[2]) * 1000
    out = model(noisy, timestep, text).sample
    assert max_error(out, reference.forward(noisy, timestep, text)) <= TOLERANCE
    out = model(noisy, timestep, text, clean_hidden_states=clean).sample
    assert max_error(out, reference.forward(noisy, timestep, text, clean=clean)) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("rope_mode", ["absolute", "relative"])
@pytest.mark.parametrize("n, window, sink", WINDOWS)
def test_cached_clean_passes_equal_whole_video(n, window, sink, rope_mode):
    model, _, _, clean, text = build(n, window, sink, rope_mode)
    whole = model(clean, torch.zeros(clean.shape[0]), text).sample
    cache = new_cache(model, max_frames=clean.shape[2])
    blocks = [write(model, block, text, cache) for block in blocks_of(clean, n)]
    assert cache.num_frames == clean.shape[2]
    assert max_error(torch.cat(blocks, dim=2), whole) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("rope_mode", ["absolute", "relative"])
@pytest.mark.parametrize("n, window, sink", WINDOWS)
def test_teacher_forcing_equals_cached_loop(n, window, sink, rope_mode):
    model, _, noisy, clean, text = build(n, window, sink, rope_mode)
    batch, frames = noisy.shape[0], noisy.shape[2]
    times = {
        "one level": torch.full((batch, frames), 1000.0),
        "all levels": torch.tensor(LEVELS).repeat(batch * frames)[: batch * frames].view(batch, frames),
        "mixed": torch.rand(batch, frames) * 1000,
    }
    cached = {level: [] for level in times}
    cache = new_cache(model, max_frames=frames)
    for i, (noisy_block, clean_block) in enumerate(zip(blocks_of(noisy, n), blocks_of(clean, n))):
        for level, timestep in times.items():
            cached[level].append(read(model, noisy_block, timestep[:, i * n : (i + 1) * n], text, cache))
        write(model, clean_block, text, cache)
    for level, timestep in times.items():
        out = model(noisy, timestep, text, clean_hidden_states=clean).sample
        assert max_error(out, torch.cat(cached[level], dim=2)) <= TOLERANCE, level


@torch.no_grad()
@pytest.mark.parametrize("rope_mode", ["absolute", "relative"])
@pytest.mark.parametrize("n, window, sink", [case for case in WINDOWS if case[1] != -1])
def test_ring_equals_keeping_everything(n, window, sink, rope_mode):
    """Long enough for every slot of the ring to be overwritten more than once; reads at two noise levels a block."""
    model, reference, *_, text = build(n, window, sink, rope_mode)
    shape = SETTINGS[n][1]
    num_blocks = 2 * window // n + 2
    cache, context = new_cache(model), reference.context_of(torch.zeros(shape)[:, :, :0], text)
    for _ in range(num_blocks):
        noisy, clean = torch.randn(*shape[:2], n, *shape[3:]), torch.randn(*shape[:2], n, *shape[3:])
        for level in (1000.0, 625.0):
            expected = reference.block(noisy, torch.full(shape[:1], level), text, context, store=False)
            assert max_error(read(model, noisy, level, text, cache), expected) <= TOLERANCE
        expected = reference.block(clean, torch.zeros(shape[0]), text, context, store=True)
        assert max_error(write(model, clean, text, cache), expected) <= TOLERANCE
    assert cache.num_frames == num_blocks * n > 2 * window


@torch.no_grad()
@pytest.mark.parametrize("n, window, sink", [(1, 4, 2), (2, 5, 1), (3, 9, 3)])
def test_relative_positions_go_beyond_the_table(n, window, sink):
    model, reference, *_, text = build(n, window, sink, "relative", rope_max_seq_len=window + 1)
    shape = SETTINGS[n][1]
    cache, context = new_cache(model), reference.context_of(torch.zeros(shape)[:, :, :0], text)
    while cache.num_frames < 2 * window:
        clean = torch.randn(*shape[:2], n, *shape[3:])
        expected = reference.block(clean, torch.zeros(shape[0]), text, context, store=True)
        assert max_error(write(model, clean, text, cache), expected) <= TOLERANCE
    long = torch.randn(*shape[:2], 2 * window // n * n, *shape[3:])
    timestep = torch.rand(shape[0]) * 1000
    assert max_error(model(long, timestep, text).sample, reference.forward(long, timestep, text)) <= TOLERANCE


@torch.no_grad()
def test_absolute_positions_end_with_the_table():
    model, _, noisy, _, text = build(2, 4, 0, rope_max_seq_len=6)
    with pytest.raises(ValueError) as error:
        model(noisy, torch.zeros(1), text)
    assert_one_line(error, 6, "relative")
    cache = new_cache(model)
    for block in blocks_of(noisy, 2)[:3]:
        write(model, block, text, cache)
    with pytest.raises(ValueError) as error:
        read(model, noisy[:, :, :2], 1000.0, text, cache)
    assert_one_line(error, 6, "relative")


@torch.no_grad()
@pytest.mark.parametrize("window, sink", [(-1, 0), (6, 2), (9, 3)])
@pytest.mark.parametrize("first", [1, 2, 3, 5])
def test_first_block_of_any_size(first, window, sink):
    """A start image is one frame, a prefix any number; the blocks that follow have the model's size, or less if
    nothing leaves the window."""
    model, reference, _, clean, text = build(3, window, sink, rope_mode="relative")
    clean = torch.cat([clean, torch.randn_like(clean)], dim=2)
    sizes = [first, 3, 2 if window == -1 else 3, 3]
    clean = clean[:, :, : sum(sizes)]
    cache = new_cache(model, max_frames=clean.shape[2])
    context = reference.context_of(clean[:, :, :0], text)
    for block in clean.split(sizes, dim=2):
        noisy = torch.randn_like(block)
        expected = reference.block(noisy, torch.full((2,), 625.0), text, context, store=False)
        assert max_error(read(model, noisy, 625.0, text, cache), expected) <= TOLERANCE
        expected = reference.block(block, torch.zeros(2), text, context, store=True)
        assert max_error(write(model, block, text, cache), expected) <= TOLERANCE
    with pytest.raises(ValueError) as error:
        read(model, clean[:, :, :4], 625.0, text, cache)
    assert_one_line(error, 4, 3)


@torch.no_grad()
@pytest.mark.parametrize("n, window, sink", [(1, 4, 2), (3, -1, 0), (3, 8, 1)])
def test_batch_equals_singles(n, window, sink):
    model, _, noisy, clean, text = build(n, window, sink, "relative")
    batch = noisy.shape[0]
    timestep = torch.rand(batch) * 1000

    def outputs(samples):
        result = [
            model(noisy[samples], timestep[samples], text[samples]).sample,
            model(noisy[samples], timestep[samples], text[samples], clean_hidden_states=clean[samples]).sample,
        ]
        cache = new_cache(model, max_frames=noisy.shape[2])
        for noisy_block, clean_block in zip(blocks_of(noisy[samples], n), blocks_of(clean[samples], n)):
            result.append(read(model, noisy_block, timestep[samples], text[samples], cache))
            write(model, clean_block, text[samples], cache)
        return result

    whole = outputs(slice(None))
    for i in range(batch):
        for together, alone in zip(whole, outputs(slice(i, i + 1))):
            assert max_error(together[i : i + 1], alone) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("n, window, sink", [(1, -1, 0), (2, 4, 2), (3, 8, 1)])
def test_timesteps_per_frame_and_per_sample_agree(n, window, sink):
    model, _, noisy, clean, text = build(n, window, sink)
    per_sample = torch.rand(noisy.shape[0]) * 1000
    per_frame = per_sample[:, None].repeat(1, noisy.shape[2])
    a = model(noisy, per_sample, text).sample
    assert max_error(model(noisy, per_frame, text).sample, a) <= TOLERANCE
    a = model(noisy, per_sample, text, clean_hidden_states=clean).sample
    assert max_error(model(noisy, per_frame, text, clean_hidden_states=clean).sample, a) <= TOLERANCE
    cache = new_cache(model, max_frames=noisy.shape[2])
    write(model, clean[:, :, :n], text, cache)
    a = read(model, noisy[:, :, n : 2 * n], per_sample, text, cache)
    assert max_error(read(model, noisy[:, :, n : 2 * n], per_frame[:, :n], text, cache), a) <= TOLERANCE


@torch.no_grad()
def test_fused_projections():
    model, reference, noisy, clean, text = build(3, 8, 1)
    timestep = torch.rand(2) * 1000
    model.fuse_qkv_projections()
    out = model(noisy, timestep, text, clean_hidden_states=clean).sample
    assert max_error(out, reference.forward(noisy, timestep, text, clean=clean)) <= TOLERANCE


@torch.no_grad()
def test_tuple_or_output():
    model, _, noisy, _, text = build(1)
    timestep = torch.zeros(3)
    out = model(noisy, timestep, text, return_dict=False)
    assert isinstance(out, tuple) and torch.equal(out[0], model(noisy, timestep, text).sample)


def test_stock_folder_loads(tmp_path):
    """A folder saved by diffusers' own class: same parameters, and our configuration by keyword."""
    stock = stock_wan(BASE)
    stock.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "WanTransformer3DModel"
    model = CausalWanTransformer3DModel.from_pretrained(tmp_path, num_frames_per_block=2, local_attn_size=4)
    assert (model.config.num_frames_per_block, model.config.local_attn_size) == (2, 4)
    assert (model.config.sink_size, model.config.rope_mode) == (0, "absolute")
    expected = stock.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    latents, text = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 5, 32)
    with torch.no_grad():
        expected = stock(latents, torch.tensor([500.0]), text).sample
        assert max_error(model(latents, torch.tensor([500.0]), text).sample, expected) <= TOLERANCE


def test_save_and_load(tmp_path):
    model, _, noisy, _, text = build(3, 9, 3, "relative")
    model.save_pretrained(tmp_path)
    loaded = CausalWanTransformer3DModel.from_pretrained(tmp_path)
    assert isinstance(loaded, WanTransformer3DModel)
    for name in MODEL_ONLY:
        assert loaded.config[name] == model.config[name]
    with torch.no_grad():
        assert torch.equal(loaded(noisy, torch.zeros(2), text).sample, model(noisy, torch.zeros(2), text).sample)


def test_fp32_modules_stay_fp32(tmp_path):
    """Norms, modulation tables and the time embedding keep fp32 when the rest is loaded in bf16."""
    model, _, noisy, clean, text = build(1, 3, 1)
    model.save_pretrained(tmp_path)
    half = CausalWanTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert half.blocks[0].scale_shift_table.dtype == torch.float32
    assert half.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    cache, cache_half = new_cache(model), new_cache(half)
    with torch.no_grad():
        for block in blocks_of(clean, 1):
            expected = write(model, block, text, cache)
            out = write(half, block.bfloat16(), text.bfloat16(), cache_half)
            assert out.dtype == torch.bfloat16
            assert (out.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


# Errors


@torch.no_grad()
def test_frames_must_fill_blocks():
    model, _, noisy, clean, text = build(3)
    for frames in (1, 4, 11):
        with pytest.raises(ValueError) as error:
            model(noisy[:, :, :frames], torch.zeros(2), text)
        assert_one_line(error, frames, 3)
    with pytest.raises(ValueError) as error:
        model(noisy[:, :, :4], torch.zeros(2), text, clean_hidden_states=clean[:, :, :4])
    assert_one_line(error, 4, 3)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["append", None])
def test_cache_modes(mode):
    model, _, noisy, _, text = build(3)
    with pytest.raises(ValueError) as error:
        read(model, noisy[:, :, :3], 0.0, text, new_cache(model, 6), mode=mode)
    assert_one_line(error, "kv_cache_mode", "read", "write", mode)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["read", "write"])
def test_cache_mode_without_cache(mode):
    model, _, noisy, _, text = build(3)
    with pytest.raises(ValueError) as error:
        model(noisy, torch.zeros(2), text, kv_cache_mode=mode)
    assert_one_line(error, "kv_cache", mode)


@torch.no_grad()
def test_frame_offset_must_follow_the_cache():
    model, _, noisy, _, text = build(3)
    cache = new_cache(model, 9)
    write(model, noisy[:, :, :3], text, cache)
    for offset in (0, 6):
        with pytest.raises(ValueError) as error:
            model(noisy[:, :, :3], torch.zeros(2), text, kv_cache=cache, kv_cache_mode="read", frame_offset=offset)
        assert_one_line(error, "frame_offset", 3, offset)


def test_configuration_errors():
    with pytest.raises(ValueError) as error:
        tiny_transformer(rope_mode="learned")
    assert_one_line(error, "rope_mode", "absolute", "relative", "learned")
    with pytest.raises(ValueError) as error:
        tiny_transformer(num_frames_per_block=3, sink_size=3, local_attn_size=5)
    assert_one_line(error, "local_attn_size", 5, 6)


def test_caches_that_skip_passes_are_refused():
    config = PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2)
    with pytest.raises(ValueError, match="PyramidAttentionBroadcastConfig skips.*it has no such cache"):
        tiny_transformer().enable_cache(config)


# Gradients


def leaves(state_dict):
    return {name: tensor.detach().double().requires_grad_() for name, tensor in state_dict.items()}


def assert_gradients(named_parameters, expected, unused=()):
    """`expected` maps names to float64 leaves after backward; errors are relative to each gradient's largest entry."""
    checked = 0
    for name, parameter in named_parameters:
        reference = expected[name].grad
        if reference is None or not reference.any():
            assert parameter.grad is None or not parameter.grad.any(), name
            assert name in unused, f"{name} has no gradient in the reference"
            continue
        assert parameter.grad is not None, f"{name} has no gradient"
        assert max_error(parameter.grad, reference) <= 2e-5 * max(1.0, reference.abs().max().item()), name
        checked += 1
    assert checked > 0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("n, window, sink, rope_mode", [(2, -1, 0, "absolute"), (3, 8, 1, "relative")])
def test_teacher_forcing_gradients(n, window, sink, rope_mode, checkpointing):
    model, _, noisy, clean, text = build(n, window, sink, rope_mode)
    if checkpointing:
        model.enable_gradient_checkpointing()
        model.train()
    timestep = torch.rand(noisy.shape[0], noisy.shape[2]) * 1000
    clean.requires_grad_()
    out = model(noisy, timestep, text, clean_hidden_states=clean).sample
    weight = torch.randn_like(out) / out[0, 0].numel() ** 0.5
    (out * weight).sum().backward()

    expected = leaves(model.state_dict())
    reference = ReferenceCausalWan(expected, dict(model.config))
    clean_double = clean.detach().double().requires_grad_()
    (reference.forward(noisy, timestep, text, clean=clean_double) * weight).sum().backward()
    assert_gradients(model.named_parameters(), expected)
    assert clean_double.grad[:, :, 0].abs().max() > 1e-3
    assert max_error(clean.grad, clean_double.grad) <= TOLERANCE


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rope_mode, window, sink", [("absolute", -1, 0), ("absolute", 5, 1), ("relative", 5, 2)])
def test_read_gradients(rope_mode, window, sink, checkpointing):
    """Under grad a read is the reference's block with a constant context; the cached text changes nothing."""
    n = 2
    model, reference, noisy, clean, text = build(n, window, sink, rope_mode)
    if checkpointing:
        model.enable_gradient_checkpointing()
        model.train()
    cache = new_cache(model, max_frames=clean.shape[2])
    with torch.no_grad():
        for block in blocks_of(clean, n)[:-1]:
            write(model, block, text, cache)
        before = read(model, noisy[:, :, -n:], 833.3333, text, cache)

    out = read(model, noisy[:, :, -n:], 833.3333, text, cache)
    assert max_error(out, before) <= TOLERANCE
    weight = torch.randn_like(out) / out[0, 0].numel() ** 0.5
    (out * weight).sum().backward()

    context = reference.context_of(clean[:, :, :-n], text)
    expected = leaves(model.state_dict())
    trainable = ReferenceCausalWan(expected, dict(model.config))
    block = trainable.block(noisy[:, :, -n:], torch.full((1,), 833.3333), text, context, store=False)
    (block * weight).sum().backward()
    assert_gradients(model.named_parameters(), expected)
    for name in ("to_k", "to_v"):
        assert getattr(model.blocks[0].attn2, name).weight.grad.abs().max() > 1e-3

    with torch.no_grad():
        after = read(model, noisy[:, :, -n:], 833.3333, text, cache)
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    "targets",
    [
        ["to_q", "to_k", "to_v", "to_out.0"],
        ["attn2.to_k", "linear_1", "linear_2", "time_proj", "proj_out"],
    ],
    ids=["blocks", "outside"],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_gradients(checkpointing, targets):
    n, rank, alpha = 2, 4, 12
    model, reference, noisy, clean, text = build(n, 5, 1, "relative")
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False))
    lora = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert lora and all("lora_" in name for name in lora)
    if checkpointing:
        model.enable_gradient_checkpointing()
        model.train()

    def effective(lora_weights):
        weights = {name: tensor.double() for name, tensor in base.items()}
        for name, a in lora_weights.items():
            if "lora_A" in name:
                b = lora_weights[name.replace("lora_A", "lora_B")]
                weights[name.replace("lora_A.default.", "")] = (
                    base[name.replace("lora_A.default.", "")].double() + alpha / rank * b @ a
                )
        return ReferenceCausalWan(weights, dict(model.config))

    expected = leaves(lora)
    trainable = effective(expected)
    cache = new_cache(model)
    context = reference.context_of(clean[:, :, :0], text)
    for noisy_block, clean_block in zip(blocks_of(noisy, n), blocks_of(clean, n)):
        out = read(model, noisy_block, 937.5, text, cache)
        weight = torch.randn_like(out) / out[0, 0].numel() ** 0.5
        (out * weight).sum().backward()
        block = trainable.block(noisy_block, torch.full((1,), 937.5), text, context, store=False)
        (block * weight).sum().backward()
        trainable = effective(expected)
        with torch.no_grad():
            write(model, clean_block, text, cache)
            trainable.block(clean_block, torch.zeros(1), text, context, store=True)
    assert_gradients(lora.items(), expected)


def test_write_under_grad_keeps_no_graph():
    model, _, noisy, clean, text = build(2, 5, 1)
    cache = new_cache(model)
    write(model, clean[:, :, :2], text, cache)
    read(model, noisy[:, :, :2], 500.0, text, cache).sum().backward()
    model.zero_grad()
    for layer in cache.layer_caches:
        assert not layer.key.requires_grad and not layer.value.requires_grad
    fresh = new_cache(model)
    with torch.no_grad():
        write(model, clean[:, :, :2], text, fresh)
        assert torch.equal(
            read(model, noisy[:, :, :2], 500.0, text, cache), read(model, noisy[:, :, :2], 500.0, text, fresh)
        )
