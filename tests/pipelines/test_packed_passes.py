"""The clean pass of a block and the first step of the next in one: which passes a video takes, and that it is the
same video."""

from contextlib import contextmanager

import pytest
import torch
from accelerate import Accelerator, cpu_offload
from accelerate.hooks import remove_hook_from_module
from accelerate.state import AcceleratorState
from diffusers.models.transformers.transformer_wan import WanAttention
from peft import LoraConfig
from torch.nn.functional import scaled_dot_product_attention

from astrolabe_diffusers import CausalWanTransformer3DModel
from astrolabe_diffusers.models.attention_causal_wan import CausalWanSelfAttnProcessor
from astrolabe_diffusers.models.rotary import apply_rotary
from astrolabe_diffusers.models.transformer_causal_wan import CausalWanTransformerBlock
from astrolabe_diffusers.pipelines.block_generation import BlockGenerator, Sampling
from tests.own_transformer import OwnTransformer
from tests.pipelines.test_scenes import TWO_STEPS, A, B, C, generate, reference, seeded
from tests.pipelines.test_stream import frames_of, switched
from tests.tiny_pipeline import SMALL, TEXT_DIM, tiny_pipeline


FOUR_STEPS = {**SMALL, "sigmas": [1.0, 0.75, 0.5, 0.25]}
WINDOWS = {
    "unlimited": {},
    "ring": {"local_attn_size": 6},
    "ring and sink": {"local_attn_size": 12, "sink_size": 3},
    "relative": {"local_attn_size": 12, "sink_size": 3, "rope_mode": "relative"},
    "gap": {"local_attn_size": 9, "sink_size": 3, "rope_mode": "relative", "rope_window": 14},
    "EMA sink": {"local_attn_size": 9, "sink_size": 3, "rope_mode": "relative", "sink_ema": 0.7},
    "frame by frame": {"num_frames_per_block": 1, "local_attn_size": 5, "sink_size": 2, "rope_mode": "relative"},
}


@contextmanager
def passes(pipe):
    """The cache modes of the transformer's calls inside."""
    modes = []

    def count(_, args, kwargs):
        modes.append(kwargs["kv_cache_mode"])

    hook = pipe.transformer.register_forward_pre_hook(count, with_kwargs=True)
    yield modes
    hook.remove()


@contextmanager
def plain(pipe):
    """Inside, no passes are packed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipe.transformer), "packs_blocks", False)
        yield


def check(pipe, run, num_packed, num_plain, tolerance=1e-5):
    """`run()` takes so many passes packed and plain, for the same latents; these are returned."""
    with passes(pipe) as packed_modes:
        latents = run()
    with plain(pipe), passes(pipe) as plain_modes:
        wanted = run()
    assert (len(packed_modes), len(plain_modes)) == (num_packed, num_plain)
    assert set(plain_modes) <= {"read", "write"}
    assert (latents - wanted).norm() <= tolerance * wanted.norm()
    return latents


@pytest.mark.parametrize("window", WINDOWS)
def test_four_passes_a_block(window):
    """Not five: two videos of eight blocks."""
    pipe = tiny_pipeline(**FOUR_STEPS, **WINDOWS[window])
    num_frames = 1 + 4 * (8 * pipe.transformer.config.num_frames_per_block - 1)

    def run():
        return generate(pipe, [A, B], generator=[seeded(0), seeded(1)], num_frames=num_frames)

    latents = check(pipe, run, 4 * 8, 4 * 8 + 7)
    other = tiny_pipeline(**FOUR_STEPS, **WINDOWS["ring" if window == "unlimited" else "unlimited"])
    if window != "frame by frame":
        # The window shows at all.
        assert (latents - generate(other, [A, B], generator=[seeded(0), seeded(1)], num_frames=93)).abs().max() > 1e-2


def test_a_window_that_is_no_whole_number_of_blocks():
    """Where it fills up, some of the frames leave and some stay: two passes, once."""
    pipe = tiny_pipeline(**FOUR_STEPS, local_attn_size=10, sink_size=1, rope_mode="relative")
    with passes(pipe) as modes:
        generate(pipe, A, num_frames=frames_of(8))
    assert modes.count("store") == 1 and modes.count("store+read") == 6
    assert modes.index("store") > modes.index("store+read")
    check(pipe, lambda: generate(pipe, A, num_frames=frames_of(8)), 4 * 8 + 1, 4 * 8 + 7)


def test_a_block_of_one_step():
    pipe = tiny_pipeline(**{**SMALL, "sigmas": [1.0]}, first_block_sigmas=[1.0, 0.5], **WINDOWS["relative"])
    check(pipe, lambda: generate(pipe, A, num_frames=frames_of(6)), 2 + 5, 2 + 5 + 5)


@pytest.mark.parametrize("window", ["unlimited", "relative", "gap", "EMA sink"])
@pytest.mark.parametrize("transition", ["roll", "recache", "cut"])
def test_another_prompt(window, transition):
    """The old block is stored with the old prompt, in a pass of its own; the stream is the call, bit for bit."""
    pipe = tiny_pipeline(**TWO_STEPS, **WINDOWS[window])
    packed = ["read", "read"] + 2 * ["store+read", "read"]
    between = {"roll": ["store"], "recache": ["store", "store"], "cut": []}[transition]
    after = ["read", "read"] + 3 * ["store+read", "read"]
    with passes(pipe) as modes:
        latents = switched(pipe, 3, B, blocks=7, transition=transition)
    assert modes == packed + between + after
    assert torch.equal(latents, switched(pipe, 3, B, blocks=7, transition=transition))
    if transition == "recache":
        wanted = reference(pipe, [A] * 3 + [B] * 4, recache_at=3, global_sink=True)
        assert (latents - wanted).abs().max() <= 1e-5
    else:
        cut = "#" * (transition == "cut")
        assert torch.equal(latents, generate(pipe, f"{A}[2.25s{cut}] | {B}[3s]"))
    with plain(pipe):
        unpacked = switched(pipe, 3, B, blocks=7, transition=transition)
    assert (latents - unpacked).norm() <= 1e-5 * unpacked.norm()


def test_videos_that_part():
    """One of two is cut. From then on each has its own passes, and their next blocks are packed again."""
    pipe = tiny_pipeline(**TWO_STEPS, **WINDOWS["relative"])
    prompts = [f"{A}[2.25s] | {B}[2.25s]", f"{C}[2.25s#] | {B}[2.25s]"]

    def run():
        return generate(pipe, prompts, generator=[seeded(0), seeded(1)])

    # The video that goes on stores with its old prompt first.
    latents = check(pipe, run, 2 * 3 + (1 + 2 * 3) + 2 * 3, 2 * 3 + 2 + (1 + 2 * 3 + 2) + (2 * 3 + 2))
    for i, prompt in enumerate(prompts):
        assert (latents[i : i + 1] - generate(pipe, prompt, generator=seeded(i))).abs().max() <= 1e-5


def test_callbacks_and_interrupts():
    """A callback sees every step, the packed ones too; it may change latents and prompt and end the video."""
    pipe = tiny_pipeline(**TWO_STEPS, **WINDOWS["relative"])
    other = pipe.encode_prompt(B)

    def run():
        seen = []

        def callback(pipe, step, timestep, values):
            assert timestep == pipe.current_timestep
            seen.append((pipe.current_block, step, values["latents"].clone()))
            if pipe.current_block == 4 and step == 0:
                pipe._interrupt = True
            if pipe.current_block == 1 and step == 1:
                return {"latents": values["latents"] * 0.9}
            return {"prompt_embeds": other} if pipe.current_block == 2 and step == 0 else {}

        names = ["latents", "prompt_embeds"]
        arguments = dict(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
        latents = generate(pipe, A, num_frames=frames_of(7), **arguments)
        assert [step[:2] for step in seen] == [(i // 2, i % 2) for i in range(9)]
        assert latents.shape[2] == 15
        return torch.cat([latents, *(step[2] for step in seen)], dim=2)

    # The block in which the prompt changed is stored with the new one, as those after it.
    check(pipe, run, 9, 9 + 4)


def test_given_frames():
    """They are stored each in a pass, but the last, which is packed."""
    pipe = tiny_pipeline(**TWO_STEPS, **WINDOWS["relative"])
    video = torch.randn(1, 4, 9, 2, 4, generator=seeded(1))
    with passes(pipe) as modes:
        generate(pipe, A, video=video, num_frames=frames_of(7))
    assert modes == ["store", "store"] + 4 * ["store+read", "read"]
    check(pipe, lambda: generate(pipe, A, video=video, num_frames=frames_of(7)), 2 + 4 * 2, 6 + 4 * 2)


def test_the_scale_of_a_lora():
    pipe = tiny_pipeline(**TWO_STEPS, **WINDOWS["ring"])
    modules = ["to_q", "to_k", "net.0.proj"]
    pipe.transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=modules))

    def run(scale=0.4):
        return generate(pipe, A, num_frames=frames_of(5), attention_kwargs={"scale": scale})

    latents = check(pipe, run, 2 * 5, 2 * 5 + 4)
    assert (latents - run(1.0)).abs().max() > 1e-2


def test_a_cache_that_several_share():
    """The past is packed, the videos that go on from it are not."""
    pipe = tiny_pipeline(**TWO_STEPS)
    sampling = Sampling([1.0, 0.5], [1.0, 0.5], max_frames=15, decode=False)
    past = pipe.block_generator_class(pipe, sampling, [0])
    past.prompt_embeds = pipe.encode_prompt(A)
    noise = torch.randn(5, 2, 4, 3, 2, 4, generator=seeded())
    with torch.no_grad(), passes(pipe) as modes:
        for block in noise[:2]:
            past.finish(past.denoise(block[:1], None, seeded()))
        past.remember()
        videos = past.share_past(2)
        for block in noise[2:]:
            videos.finish(videos.denoise(block, None, seeded()))
    assert modes == ["read", "read", "store+read", "read", "store"] + ["read", "read", "store"] * 2 + ["read", "read"]


@pytest.mark.parametrize("settings", [{"num_context_frames": 3}, {"past_weight": 0.5, "local_attn_size": 9}])
def test_what_is_never_packed(settings):
    pipe = tiny_pipeline(**TWO_STEPS, **settings)
    with passes(pipe) as modes:
        generate(pipe, A, num_frames=frames_of(4))
    assert "store+read" not in modes and modes.count("read") == 8


def test_a_transformer_that_knows_two_modes():
    pipe = tiny_pipeline(**TWO_STEPS, transformer=OwnTransformer(text_dim=TEXT_DIM))
    with passes(pipe) as modes:
        generate(pipe, A, num_frames=frames_of(3))
    assert modes == ["read", "read"] + 2 * ["write", "read", "read"]


# What users put in the place of ours, and that looks at the mode


class OwnProcessor:
    """Self-attention as it is written by who knows of `"read"` and `"write"`."""

    def __call__(self, attn, hidden_states, text, attention_mask, rotary_emb, layout, kv_cache, kv_cache_mode):
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, attn.to_v(hidden_states)))
        query, key = apply_rotary(query, rotary_emb), apply_rotary(key, rotary_emb)
        keys, values = kv_cache.extend(key, value)
        if kv_cache_mode == "write":
            kv_cache.store(key, value)
        attended = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, keys, values)))
        return attn.to_out[0](attended.transpose(1, 2).flatten(2))


MODES = set()


class SubclassOfOurProcessor(CausalWanSelfAttnProcessor):
    def __call__(self, *args, kv_cache_mode=None, **kwargs):
        MODES.add(kv_cache_mode)
        return super().__call__(*args, kv_cache_mode=kv_cache_mode, **kwargs)


class OwnAttention(WanAttention):
    def forward(self, *args, kv_cache_mode=None, **kwargs):
        MODES.add(kv_cache_mode)
        return super().forward(*args, kv_cache_mode=kv_cache_mode, **kwargs)


class OwnBlock(CausalWanTransformerBlock):
    def forward(self, hidden_states, text, temb, rotary, layout, kv_cache, kv_cache_mode, mask):
        MODES.add(kv_cache_mode)
        return super().forward(hidden_states, text, temb, rotary, layout, kv_cache, kv_cache_mode, mask)


class OwnModel(CausalWanTransformer3DModel):
    def forward(self, *args, **kwargs):
        MODES.add(kwargs["kv_cache_mode"])
        return super().forward(*args, **kwargs)


def use_processor(transformer, processor):
    ours = transformer.attn_processors
    transformer.set_attn_processor({name: processor if "attn1" in name else ours[name] for name in ours})


def use_class(module, own):
    module.__class__ = own


def patch_forward(module, mode):
    """`mode` finds the cache mode among the arguments."""

    def forward(*args, ours=module.forward, **kwargs):
        MODES.add(mode(args, kwargs))
        return ours(*args, **kwargs)

    module.forward = forward


CHANGES = {
    "processor": lambda model: use_processor(model, OwnProcessor()),
    "subclass of our processor": lambda model: use_processor(model, SubclassOfOurProcessor()),
    "processor of one layer": lambda model: model.blocks[1].attn1.set_processor(SubclassOfOurProcessor()),
    "attention": lambda model: use_class(model.blocks[1].attn1, OwnAttention),
    "block": lambda model: use_class(model.blocks[0], OwnBlock),
    "forward of one block": lambda model: patch_forward(model.blocks[0], lambda args, kwargs: args[6]),
    "forward of one model": lambda model: patch_forward(model, lambda args, kwargs: kwargs["kv_cache_mode"]),
    "model": lambda model: use_class(model, OwnModel),
}


@pytest.mark.parametrize("change", CHANGES)
def test_who_knows_two_modes_is_given_two(change):
    pipe = tiny_pipeline(**TWO_STEPS, **WINDOWS["relative"])
    with plain(pipe):
        expected = generate(pipe, A, num_frames=frames_of(6))
    assert pipe.transformer.packs_blocks and pipe.transformer.packs_clips
    CHANGES[change](pipe.transformer)
    assert not pipe.transformer.packs_clips
    MODES.clear()
    with passes(pipe) as modes:
        latents = generate(pipe, A, num_frames=frames_of(6))
    assert (latents - expected).abs().max() <= 1e-5
    assert modes == ["read", "read"] + 5 * ["write", "read", "read"]
    assert MODES == (set() if change == "processor" else {"read", "write"})


class KnowsThemAll(OwnModel):
    packs_blocks = True


def test_who_knows_more_modes_says_so():
    pipe = tiny_pipeline(**TWO_STEPS, **WINDOWS["ring"])
    pipe.transformer.__class__ = KnowsThemAll
    check_modes(pipe)
    assert not pipe.transformer.packs_clips  # another thing to know


def check_modes(pipe):
    with passes(pipe) as modes:
        generate(pipe, A, num_frames=frames_of(3))
    assert modes == ["read", "read"] + 2 * ["store+read", "read"]


def add_lora(transformer):
    transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "net.0.proj"]))


def offload_layers(transformer):
    transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")


def offload_blocks(transformer):
    cpu = torch.device("cpu")
    transformer.enable_group_offload(cpu, cpu, offload_type="block_level", num_blocks_per_group=1)


def offload_and_take_back(transformer):
    cpu_offload(transformer, torch.device("cpu"))
    remove_hook_from_module(transformer, recurse=True)


def prepare(transformer):
    """As evaluation does it in bf16."""
    AcceleratorState._reset_state(reset_partial_state=True)  # tests before may have left another precision
    Accelerator(mixed_precision="bf16", cpu=True).prepare_model(transformer, evaluation_mode=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def under_autocast(transformer):
    """As `distributed.sharding.shard` does it."""
    transformer.forward = torch.autocast("cpu", torch.bfloat16)(transformer.forward)


@pytest.mark.parametrize(
    "change",
    [
        add_lora,
        prepare,
        under_autocast,
        offload_layers,
        offload_blocks,
        offload_and_take_back,
        lambda transformer: cpu_offload(transformer, torch.device("cpu")),
        lambda transformer: transformer.fuse_qkv_projections(),
        lambda transformer: transformer.set_attention_backend("native"),
    ],
)
def test_what_leaves_the_modes_to_ours(change):
    pipe = tiny_pipeline(**TWO_STEPS, **WINDOWS["ring"])
    change(pipe.transformer)
    check_modes(pipe)


class EulerBlocks(BlockGenerator):
    """A block loop of one's own that makes no pairs."""

    def denoise(self, noise, original, generator):
        self.remember()
        for t, step in ((1000.0, 0.5), (500.0, 0.5)):
            noise = noise - step * self.predict(noise, noise.new_tensor([t]), self.prompt_embeds, "read").float()
        return noise


@pytest.mark.parametrize("window", ["ring", "relative"])
def test_a_loop_of_ones_own_needs_no_room_for_pairs(window, monkeypatch):
    pipe, caches = tiny_pipeline(**TWO_STEPS, **WINDOWS[window]), []
    new_kv_cache = pipe.transformer.new_kv_cache
    monkeypatch.setattr(
        pipe.transformer, "new_kv_cache", lambda *args: caches.append(new_kv_cache(*args)) or caches[-1]
    )
    for generator in (BlockGenerator, EulerBlocks):
        monkeypatch.setattr(type(pipe), "block_generator_class", generator)
        generate(pipe, A, num_frames=frames_of(6))
    frames = [cache.get(0).key.shape[1] // cache.state.frame_tokens for cache in caches]
    config = pipe.transformer.config
    margin = config.num_frames_per_block + config.sink_size * (config.rope_mode == "relative")
    assert frames == [config.local_attn_size + margin, config.local_attn_size]
