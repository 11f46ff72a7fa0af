"""The clean pass of a block and the first step of the next in one: which passes a video takes, and that it is the
same video."""

from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig

from astrolabe_diffusers.pipelines.block_generation import Sampling
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
    pipe.transformer.packs_blocks = False
    yield
    del pipe.transformer.packs_blocks


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


@pytest.mark.parametrize("window", ["unlimited", "relative"])
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
        videos = past.share_past(2, past.prompt_embeds.expand(2, -1, -1))
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
