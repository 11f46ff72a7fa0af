"""Streams that are told something while they run."""

import gc
import math
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from astrolabe_diffusers import CausalWanPipeline
from astrolabe_diffusers.pipelines.block_generation import EncodedScene
from tests.pipelines.test_block_generation import server_context
from tests.pipelines.test_scenes import TWO_STEPS, A, B, C, N, generate, reference, seeded
from tests.tiny_pipeline import tiny_pipeline


WINDOW = {**TWO_STEPS, "local_attn_size": 9, "sink_size": 3, "rope_mode": "relative"}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(**WINDOW)


def frames_of(blocks):
    return 12 * blocks - 3


def switched(pipe, at, prompt, blocks=6, first=A, output_type="latent", **kwargs):
    """Latents of a stream whose prompt is changed before block `at`."""
    stream = pipe.stream(first, num_frames=frames_of(blocks), generator=seeded(), output_type=output_type)
    pieces = [next(stream) for _ in range(at)]
    stream.set_prompt(prompt, **kwargs)
    return torch.cat([*pieces, *stream], dim=2 if output_type == "latent" else 1)


def test_roll_is_a_soft_scene_and_cut_a_hard_one(pipe):
    assert torch.equal(switched(pipe, 2, B), generate(pipe, f"{A}[1.5s] | {B}[3s]"))
    assert torch.equal(switched(pipe, 2, B, transition="cut"), generate(pipe, f"{A}[1.5s#] | {B}[3s]"))


@pytest.mark.parametrize("config", [{"rope_mode": "absolute"}, {}, {"rope_window": 11}, {"sink_ema": 0.7}])
@pytest.mark.parametrize("at", [1, 3, 4, 7])
def test_recache_equals_the_reference(at, config):
    """At 1 and 3 blocks all frames are in the window of nine, then some have left it."""
    pipe, texts = tiny_pipeline(**{**WINDOW, **config}), [A] * at + [B] * 3
    rolled = switched(pipe, at, B, blocks=at + 3)
    results = []
    for global_sink in (True, False):
        result = switched(pipe, at, B, blocks=at + 3, transition="recache", global_sink=global_sink)
        # Before a frame has left it, the window begins with the sink.
        if at > 3 or global_sink:
            wanted = reference(pipe, texts, recache_at=at, global_sink=global_sink)
        assert (result - wanted).abs().max() <= 1e-5
        assert (result - rolled)[:, :, at * N :].abs().max() > 1e-3
        results.append(result)
    if at > 3:
        assert (results[0] - results[1])[:, :, at * N :].abs().max() > 1e-3


def test_recache_of_a_model_that_remembers_all():
    pipe = tiny_pipeline(**TWO_STEPS)
    result = switched(pipe, 2, B, blocks=4, transition="recache")
    assert (result - reference(pipe, [A, A, B, B], recache_at=2)).abs().max() <= 1e-5


# Share of the new prompt in each block from the change on, as in Krea's server: linspace(0, 1, k).
SHARES = {1: [1, 1], 2: [0, 1, 1], 3: [0, 1 / 2, 1, 1], 4: [0, 1 / 3, 2 / 3, 1]}


@pytest.mark.parametrize("config", [WINDOW, {"num_context_frames": 3}])
@pytest.mark.parametrize("num_blocks", SHARES)
def test_text_may_change_over_several_blocks(num_blocks, config):
    pipe = tiny_pipeline(**{**TWO_STEPS, **config})
    old, new = pipe.encode_prompt(A), pipe.encode_prompt(B)
    texts = [old, *((1 - share) * old + share * new for share in SHARES[num_blocks])]
    context = {"encode_context": server_context(pipe.vae)} if "num_context_frames" in config else {}
    result = switched(pipe, 1, B, blocks=len(texts), num_blocks=num_blocks)
    assert (result - reference(pipe, texts, **context)).abs().max() <= 1e-5


def test_a_context_that_is_encoded_anew_has_the_prompt_of_its_block():
    """Krea: the block after the change still sees the old frames under the old prompt."""
    pipe = tiny_pipeline(**TWO_STEPS, num_context_frames=3)
    result = switched(pipe, 1, B, blocks=2)
    wanted = reference(pipe, [A, B], encode_context=lambda video: video)
    assert (result - wanted).abs().max() <= 1e-5


def test_scenes_to_come_are_dropped_or_new(pipe):
    changed = switched(pipe, 2, f"{B}[.75s] | {A}", first=f"{A}[2.25s] | {C}[2.25s]")
    assert torch.equal(changed, generate(pipe, f"{A}[1.5s] | {B}[.75s] | {A}[2.25s]"))


def test_one_prompt_a_video(pipe):
    stream = pipe.stream([A, C], num_frames=frames_of(4), generator=[seeded(0), seeded(1)], output_type="latent")
    pieces = [next(stream)]
    stream.set_prompt([B, A], transition="cut")
    latents = torch.cat([*pieces, *stream], dim=2)
    for i, prompt in enumerate((f"{A}[.75s#] | {B}[2.25s]", f"{C}[.75s#] | {A}[2.25s]")):
        assert (latents[i : i + 1] - generate(pipe, prompt, generator=seeded(i))).abs().max() < 1e-5


def test_from_another_thread_the_last_call_counts(pipe):
    stream = pipe.stream(A, num_frames=frames_of(4), generator=seeded(), output_type="latent")
    pieces = [next(stream)]
    thread = threading.Thread(target=lambda: [stream.set_prompt(text) for text in (C, A, B)])
    thread.start()
    thread.join()
    assert torch.equal(torch.cat([*pieces, *stream], dim=2), generate(pipe, f"{A}[.75s] | {B}[2.25s]"))


def test_two_threads_ask_one_stream(pipe):
    """Each block goes to one of them, and the video is the same."""
    stream = pipe.stream(A, num_frames=frames_of(6), generator=seeded(), output_type="latent")
    with ThreadPoolExecutor(2) as pool:
        blocks = sum(pool.map(list, [stream, stream]), [])
    expected = generate(pipe, A, num_frames=frames_of(6)).split(N, dim=2)
    assert len(blocks) == 6 and all(any(torch.equal(block, other) for other in blocks) for block in expected)
    # At its end an iterator stays there, as every one does in Python.
    assert list(stream) == []


def test_streams_do_not_hear_each_other(pipe):
    streams = [pipe.stream(A, num_frames=frames_of(4), generator=seeded(), output_type="latent") for _ in range(2)]
    pieces = [[next(stream)] for stream in streams]
    streams[1].set_prompt(B, transition="recache")
    for _ in range(3):
        for stream, mine in zip(streams, pieces):
            mine.append(next(stream))
    assert torch.equal(torch.cat(pieces[0], dim=2), generate(pipe, A, num_frames=frames_of(4)))
    assert torch.equal(torch.cat(pieces[1], dim=2), switched(pipe, 1, B, blocks=4, transition="recache"))


def test_a_stream_without_an_end(pipe):
    sizes = []
    with pipe.stream(A, generator=seeded(), num_frames=math.inf, output_type="pt") as stream:
        for block in range(12):
            if block == 8:
                stream.set_prompt(B, transition="recache")
            next(stream)
            sizes.append(sum(x.numel() for x in gc.get_objects() if type(x) is torch.Tensor))
    # The window is full after three blocks.
    assert max(sizes[4:]) == min(sizes[4:])
    with pytest.raises(StopIteration):
        next(stream)


@pytest.mark.parametrize("model", [WINDOW, {"num_context_frames": 3}])
def test_an_endless_stream_keeps_no_more_than_its_window(model):
    pipe = tiny_pipeline(**TWO_STEPS | model)

    def kept():
        gc.collect()
        return sum(x.untyped_storage().nbytes() for x in gc.get_objects() if type(x) is torch.Tensor)

    with pipe.stream(A, num_frames=math.inf, output_type="latent") as stream:
        sizes = []
        for _ in range(12):
            next(stream)
            sizes.append(kept())
    assert len(set(sizes[6:])) == 1, sizes


def test_what_is_yielded_may_be_changed(pipe):
    """Latents are not the model's memory, nor those that were given."""
    given = pipe(A, num_frames=9, generator=seeded(), output_type="latent").frames
    before = given.clone()

    def latents(change):
        pieces = []
        with pipe.stream(A, num_frames=45, video=given, generator=seeded(), output_type="latent") as stream:
            for piece in stream:
                pieces.append(piece.clone())
                change(piece)
        return torch.cat(pieces, dim=2)

    assert torch.equal(latents(lambda piece: piece.mul_(2).add_(1)), latents(lambda piece: None))
    assert torch.equal(given, before)


def test_scenes_may_be_given_as_embeddings():
    """As `encode_prompt` of another pipeline makes them, in its dtype. A video that cuts may pass the positions that
    the model has."""
    pipe = tiny_pipeline(**TWO_STEPS, rope_max_seq_len=9).to(torch.bfloat16)
    embeds = pipe.encode_prompt([A, B]).float()
    scenes = [EncodedScene(embeds[0], 0), EncodedScene(embeds[1], 2, "cut")]
    size = {"num_frames": 45, "output_type": "latent"}
    given = pipe(prompt_embeds=[scenes], generator=seeded(), **size).frames
    assert torch.equal(given, pipe(f"{A} [1.5s#] | {B} [1.5s]", generator=seeded(), **size).frames)
    with pytest.raises(ValueError, match="passes the model's 9 absolute positions"):
        pipe(prompt_embeds=[[replace(scene, transition="roll") for scene in scenes]], **size)


def test_a_prompt_needs_a_text_encoder(pipe):
    other = CausalWanPipeline.from_pipe(pipe, text_encoder=None, tokenizer=None)
    with other.stream(prompt_embeds=pipe.encode_prompt(A), num_frames=33, output_type="latent") as stream:
        next(stream)
        with pytest.raises(ValueError, match="no text encoder"):
            stream.set_prompt(B)
        assert len(list(stream)) == 2


def test_the_noise_of_an_endless_stream_is_its_generator_s(pipe):
    streams = [pipe.stream(A, generator=seeded(), num_frames=math.inf, output_type="latent") for _ in range(2)]
    blocks = [[next(stream) for _ in range(3)] for stream in streams]
    assert all(torch.equal(*pair) for pair in zip(*blocks)) and (blocks[0][0] - blocks[0][1]).abs().max() > 0.1


def test_a_closed_stream_leaves_nothing(pipe):
    stream = pipe.stream(A, num_frames=frames_of(4), output_type="pt")
    next(stream), next(stream)
    generators = [x for x in gc.get_objects() if type(x).__name__ == "BlockGenerator"]
    key = weakref.ref(generators[-1].kv_cache.get(0).key)
    del generators
    gc.disable()
    try:
        stream.close()
        assert key() is None
        stream.close()
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"transition": "fade"}, "must be one of .*roll.*recache.*cut"),
        ({"num_blocks": 0}, "at least 1"),
        ({"num_blocks": 3, "transition": "recache"}, "only with transition='roll'"),
        ({"num_blocks": 1.5}, "a whole number of at least 1"),
        ({"global_sink": False}, "only with transition='recache'"),
        ({"global_sink": False, "transition": "cut"}, "only with transition='recache'"),
        ({"prompt": None}, "None is no text"),
        ({"prompt": [A, B]}, "2 prompts for 1 videos"),
        ({"prompt": "a [red] car"}, "character 3"),
    ],
)
def test_what_a_user_gets_wrong(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe.stream(A).set_prompt(**{"prompt": B, **arguments})


def test_models_that_have_an_end():
    for config in ({}, {"rope_mode": "relative"}, {"local_attn_size": 9}):
        with pytest.raises(ValueError, match="num_frames=inf` needs a model whose memory is bounded"):
            tiny_pipeline(**config).stream(A, num_frames=math.inf)
    next(tiny_pipeline(**TWO_STEPS, num_context_frames=3).stream(A, num_frames=math.inf))
    with pytest.raises(ValueError, match="use `stream`"):
        tiny_pipeline(**WINDOW)(A, num_frames=math.inf)
    with pytest.raises(ValueError, match="drawn block by block"):
        tiny_pipeline(**WINDOW).stream(A, num_frames=math.inf, latents=torch.zeros(1, 16, 3, 8, 8))
