"""How a video goes on with another prompt: what is remembered of it, and where in time that stands."""

import functools

import pytest
import torch

from astrolabe_diffusers import CausalWanKVCache
from astrolabe_diffusers.models.rotary import CausalWanRotaryPosEmbed
from astrolabe_diffusers.pipelines.scene_prompt import TRANSITIONS
from astrolabe_diffusers.training.policies import use_policy
from tests.own_transformer import OwnTransformer
from tests.pipelines.test_packed_passes import passes, plain
from tests.pipelines.test_scenes import TWO_STEPS, A, B, C, generate, seeded
from tests.reference_causal_wan import ReferenceCausalWan, published_noise
from tests.reference_transitions import SlowScenes
from tests.tiny_pipeline import tiny_pipeline
from tests.training.helpers import policy_pipeline


WINDOWS = {
    "unlimited": {},
    "sink": {"local_attn_size": 9, "sink_size": 3},
    "no sink": {"local_attn_size": 9},
    "Infinity-RoPE": {"local_attn_size": 6, "sink_size": 1},
    "Self Gradient Forcing": {"num_frames_per_block": 1, "local_attn_size": 9, "sink_size": 4},
    "two frames a block": {"num_frames_per_block": 2, "local_attn_size": 7, "sink_size": 1},
    "sink alone": {"local_attn_size": 6, "sink_size": 3},
    "one frame beside the sink": {"local_attn_size": 6, "sink_size": 2},
    "the block alone": {"local_attn_size": 3},
}
SHORT = {"height": 16, "width": 16}


def build(window="sink", rope_mode="relative", **kwargs):
    return tiny_pipeline(**{**TWO_STEPS, **SHORT, **WINDOWS[window], "rope_mode": rope_mode, **kwargs})


# For tests that change nothing of it.
shared = functools.cache(build)


@functools.cache
def embeds_of(pipe, text):
    return pipe.encode_prompt(text)


def texts_of(changes, num_blocks):
    """The prompt of each block; it changes with every transition."""
    texts, prompts = [], [A, B, C]
    for block in range(num_blocks):
        texts.append(prompts[sum(at <= block for at in changes) % 3])
    return texts


def stream(pipe, changes, num_blocks, seed=0, first=A):
    """Latents of a stream whose prompt changes before some blocks: `{block: transition}`."""
    n = pipe.transformer.config.num_frames_per_block
    texts, pieces = texts_of(changes, num_blocks), []
    frames = 1 + 4 * (num_blocks * n - 1)
    with pipe.stream(first, num_frames=frames, generator=seeded(seed), output_type="latent") as blocks:
        for block in range(num_blocks):
            if block in changes:
                name, _, sink = changes[block].partition(" ")
                blocks.set_prompt(texts[block], transition=name, **({"global_sink": False} if sink else {}))
            pieces.append(next(blocks))
    return torch.cat(pieces, dim=2)


def slowly(pipe, changes, num_blocks, seed=0):
    """The same by the reference, and the reference."""
    config, sigmas = pipe.transformer.config, pipe.config.sigmas
    n = config.num_frames_per_block
    shape = (1, 4, n * num_blocks, pipe.config.height // 8, pipe.config.width // 8)
    noise, renoise = published_noise(seeded(seed), shape, n, [len(sigmas)] * num_blocks)
    slow = SlowScenes(ReferenceCausalWan(pipe.transformer.state_dict(), dict(config)))
    slow.slow.past_weight = pipe.config.past_weight
    texts = [embeds_of(pipe, text) for text in texts_of(changes, num_blocks)]
    return slow.sample(noise, renoise, texts, changes, sigmas), slow


@functools.cache
def rolled(pipe, blocks, num_blocks):
    """The stream whose prompt changes before these blocks, and nothing is forgotten."""
    return stream(pipe, dict.fromkeys(blocks, "roll"), num_blocks)


def check(pipe, changes, num_blocks):
    result, (wanted, slow) = stream(pipe, changes, num_blocks), slowly(pipe, changes, num_blocks)
    assert (result - wanted).abs().max() <= 1e-5
    return result, slow


@pytest.mark.parametrize("rope_mode", ["absolute", "relative"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("first, second", [("flush", "rope_cut"), ("rope_cut", "flush")])
def test_equals_the_reference(first, second, window, rope_mode):
    """When the window is not full yet, when it has been full for long, one block after another, and on until it has
    been full again."""
    pipe = shared(window, rope_mode)
    per_block = max(1, 3 // pipe.transformer.config.num_frames_per_block)
    changes = {1: first, 2: second, 5 * per_block: second, 6 * per_block: first}
    result, _ = check(pipe, changes, 10 * per_block)
    if window != "the block alone":
        assert (result - rolled(pipe, tuple(changes), 10 * per_block)).abs().max() > 1e-3


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_a_lora_that_changes_with_the_prompt(transition, monkeypatch):
    """No pass has keys of a text that other weights made: as if every pass made its own."""
    pipe = policy_pipeline(**{**TWO_STEPS, **SHORT, **WINDOWS["sink"], "rope_mode": "relative"})

    def video():
        pieces = []
        with pipe.stream(A, num_frames=57, generator=seeded(), output_type="latent") as blocks:
            for policy, prompt in (("base", None), ("base", None), ("current", B), ("base", C), ("current", None)):
                if prompt:
                    blocks.set_prompt(prompt, transition=transition)
                with use_policy(pipe.transformer, policy):
                    pieces.append(next(blocks))
        return torch.cat(pieces, dim=2)

    result = video()
    monkeypatch.setattr(CausalWanKVCache, "set_text", lambda self, text: None)
    assert (result - video()).abs().max() < 1e-5


@pytest.mark.parametrize("rope_mode", ["absolute", "relative"])
@pytest.mark.parametrize("window", ["unlimited", "sink", "no sink", "Self Gradient Forcing"])
@pytest.mark.parametrize("recache", ["recache", "recache all"])
def test_with_the_other_transitions(recache, window, rope_mode):
    """A recache before a flush, right after it, when the window is full again, and rolls between."""
    pipe = shared(window, rope_mode)
    changes = {1: "flush", 2: recache, 3: "rope_cut", 5: recache, 6: recache, 7: "flush", 8: "roll", 9: recache}
    check(pipe, changes | {12: recache, 13: "rope_cut"}, 16)


def test_the_first_frame_counts_in_full_after_a_flush():
    """`past_weight` weakens all others."""
    pipe = build(past_weight=0.3)
    result, _ = check(pipe, {3: "flush", 6: "rope_cut"}, 9)
    assert (result - stream(build(), {3: "flush", 6: "rope_cut"}, 9)).abs().max() > 1e-3


def test_what_is_seen_after_a_flush():
    """The spec in numbers: frame 0 and the newest two, then a window that fills again; rows from 45 on after a cut."""
    _, slow = slowly(build(), {4: "rope_cut"}, 8)
    step, clean = slow.passes[4 * 3], slow.passes[4 * 3 + 2]
    assert step == clean == ([0, 10, 11], [0, 1, 2], [45, 46, 47])
    assert slow.passes[5 * 3] == ([0, 10, 11, 12, 13, 14], [0, 1, 2, 3, 4, 5], [6, 7, 8])
    assert slow.passes[7 * 3] == ([0, 10, 11, 18, 19, 20], [0, 1, 2, 3, 4, 5], [6, 7, 8])
    _, slow = slowly(build(rope_mode="absolute"), {4: "rope_cut"}, 6)
    assert slow.passes[4 * 3] == ([0, 10, 11], [0, 10, 11], [54, 55, 56])
    assert slow.passes[5 * 3][1:] == ([0, *range(10, 15)], [15, 16, 17])


@pytest.mark.parametrize("rope_mode", ["absolute", "relative"])
def test_a_window_with_room_for_three_has_nothing_to_forget(rope_mode):
    pipe = build("Infinity-RoPE", rope_mode)
    flushed, rolled = (stream(pipe, {2: name, 5: name}, 7) for name in ("flush", "roll"))
    assert (flushed - rolled).abs().max() <= 1e-5


@pytest.mark.parametrize("transition", ["recache", "flush", "rope_cut"])
def test_a_stream_is_the_call(transition):
    pipe = build()
    latents = stream(pipe, {3: transition, 5: transition}, 8)
    assert torch.equal(latents, generate(pipe, f"{A}[2.25s {transition}] | {B}[1.5s {transition}] | {C}[2.25s]"))


@pytest.mark.parametrize("window", ["unlimited", "sink"])
def test_passes(window):
    """The old block is stored with its own prompt. After a cut the next but one block has a pass of its own too."""
    pipe = build(window)
    packed, old = ["store+read", "read"], ["store", "read", "read"]
    for transition, after in {"flush": packed, "rope_cut": old}.items():
        with passes(pipe) as modes:
            latents = stream(pipe, {3: transition}, 7)
        assert modes == ["read", "read", *packed, *packed, *old, *after, *packed, *packed]
        with plain(pipe):
            assert (latents - stream(pipe, {3: transition}, 7)).abs().max() <= 1e-5


def test_videos_of_a_batch_part():
    """Each has its own transitions, at its own blocks; those that have the same one stay together."""
    pipe, ways = build(), ("roll", "recache", "flush", "rope_cut", "cut")
    prompts = [f"{A}[2.25s {way}] | {B}[1.5s {other}] | {C}[3s]" for way, other in zip(ways, ways[2:] + ways[:2])]
    prompts += [f"{B}[3.75s rope_cut] | {A}[3s]", f"{B}[2.25s flush] | {C}[4.5s]", prompts[2]]
    # While the cut of both lasts.
    prompts += [f"{A}[2.25s rope_cut] | {B}[.75s flush] | {C}[3.75s]", f"{C}[2.25s rope_cut] | {B}[4.5s]"]
    seeds = range(len(prompts))
    latents = generate(pipe, prompts, generator=[seeded(seed) for seed in seeds])
    for seed, prompt in zip(seeds, prompts):
        assert (latents[seed : seed + 1] - generate(pipe, prompt, generator=seeded(seed))).abs().max() <= 1e-5


def test_many_flushes_do_not_wear_the_first_frame_out():
    """In bfloat16, whose keys a rotation rounds: the first frame's are rotated from what was stored, each time."""
    pipe = build().to(torch.bfloat16)
    cache, config = pipe.transformer.new_kv_cache(), pipe.transformer.config
    generator, embeds = seeded(), pipe.encode_prompt(A)
    with torch.no_grad():
        for block in range(20):
            latents = torch.randn(1, 4, 3, 2, 2, generator=generator).bfloat16()
            clean = {"kv_cache": cache, "kv_cache_mode": "store", "frame_offset": 3 * block}
            pipe.transformer(latents, torch.zeros(1), embeds, **clean)
            if block == 0:
                stored = cache.get(0).key[:, cache.state.tokens(0)].float()
            cache.flush(config, pipe.transformer.rope)
        key = cache.get(0).key[:, cache.state.tokens(0)].float()
    # Frame 57 is the last but two of 60; the rotation is computed here.
    dim = pipe.transformer.rope.t_dim
    angles = 57 * 10000.0 ** (-torch.arange(0, dim, 2).double() / dim)
    turned = torch.view_as_complex(stored.double().unflatten(-1, (-1, 2)))
    turned[..., : dim // 2] *= torch.polar(torch.ones_like(angles), angles)
    wanted = torch.view_as_real(turned).flatten(-2)
    assert (key - wanted).abs().max() <= 2**-8 * wanted.abs().max()


def test_where_they_are_not_possible():
    own, window = build(), {"local_attn_size": 6, "sink_size": 1}
    own.transformer = OwnTransformer()
    bank = {"rope_mode": "absolute", "memory_bank_size": 2, **window}
    for pipe in (build(num_context_frames=3), own, build(**window, sink_ema=0.9), build(**bank)):
        assert pipe.transitions == ("roll", "recache", "cut")
        for transition in ("flush", "rope_cut"):
            message = rf"one of .*'roll', 'recache', 'cut'.* but is '{transition}'. It needs a cache that lasts"
            with pytest.raises(ValueError, match=message):
                pipe.stream(A).set_prompt(B, transition)
            with pytest.raises(ValueError, match=message):
                pipe.stream(A).set_prompt(f"{B} [1s {transition}] | {C}")
            with pytest.raises(ValueError, match=message):
                pipe.stream(f"{A} [1s {transition}] | {B}")
    with pytest.raises(ValueError, match=r"must be one of .*'flush', 'rope_cut', 'cut'.* but is 'fade'.$"):
        build().stream(A).set_prompt(B, "fade")


def test_positions_go_on():
    """All but a cut: with absolute positions the video ends where it would."""
    pipe = build(rope_mode="absolute", rope_max_seq_len=9)
    assert isinstance(pipe.transformer.rope, CausalWanRotaryPosEmbed)
    with pytest.raises(ValueError, match="9 absolute positions"):
        generate(pipe, f"{A}[2.25s flush] | {B}[1.5s]")
    # Rows after a RoPE cut may pass the table.
    assert generate(pipe, f"{A}[1.5s rope_cut] | {B}[.75s]").shape[2] == 9


def test_scenes_that_come_while_the_text_still_changes():
    """They wait for it; of several the last one is shown, and comes as the one that forgets most."""
    pipe, videos = build(), []
    for prompt in (f"{B}[.75s#] | {C}[.75s] | {A}", B):
        with pipe.stream(A, num_frames=12 * 6 - 3, generator=seeded(), output_type="latent") as blocks:
            pieces = [next(blocks)]
            blocks.set_prompt(prompt, num_blocks=3)
            videos.append(torch.cat([*pieces, *blocks], dim=2))
    latents, changing = videos
    assert torch.equal(latents[:, :, :9], changing[:, :, :9])
    generator = seeded()
    noise, _ = published_noise(generator, (1, 4, 18, 2, 2), 3, [2] * 3)
    # The change is over with the fourth block; the cut is due since the third.
    alone = generate(pipe, A, generator=generator, latents=noise[:, :, 9:], num_frames=33)
    assert torch.equal(latents[:, :, 9:], alone)
