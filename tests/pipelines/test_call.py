"""Several calls on one pipeline: each has its own place and ends by itself."""

import copy
import threading

import pytest
import torch

from tests.pipelines.test_scenes import A, B, seeded
from tests.tiny_pipeline import SMALL, tiny_pipeline


NUM_FRAMES = 45  # 4 blocks
ONE_LAYER = {**SMALL, "num_layers": 1}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(**ONE_LAYER)


@pytest.fixture(scope="module")
def whole(pipe):
    """Latents of the videos of seeds 0 and 1."""
    return [torch.cat(list(stream(pipe, seed)), dim=2) for seed in (0, 1)]


def stream(pipe, seed, prompt=A, **kwargs):
    return pipe.stream(prompt, num_frames=NUM_FRAMES, generator=seeded(seed), output_type="latent", **kwargs)


def stop_at(block, step=0):
    def on_step_end(pipe, i, timestep, kwargs):
        if (pipe.current_block, i) == (block, step):
            pipe._interrupt = True
        return {}

    return on_step_end


def test_an_interrupt_in_a_callback_is_that_call_s(pipe, whole):
    """The other stream, which takes turns, goes on to its end; and a stream that starts takes no interrupt back."""
    streams = [stream(pipe, 0, callback_on_step_end=stop_at(1)), stream(pipe, 1)]
    pieces = [[], []]
    for turn in range(4):
        for mine, blocks in zip(pieces, streams):
            mine += [block for block in [next(blocks, None)] if block is not None]
        if turn == 0:
            streams.append(stream(pipe, 2))
            next(streams[2])
    assert [len(mine) for mine in pieces] == [2, 4]
    assert torch.equal(pieces[0][0], whole[0][:, :, :3])
    assert torch.equal(torch.cat(pieces[1], dim=2), whole[1])


def test_calls_in_threads(pipe, whole):
    """Both are in their second block at the same time; one ends there."""
    together, results, seen = threading.Barrier(2, timeout=60), {}, {0: [], 1: []}

    def generate(seed):
        def on_step_end(pipe, i, timestep, kwargs):
            if i == 0:
                together.wait()
                seen[seed].append((pipe.current_block, pipe.num_timesteps, round(pipe.current_timestep.item())))
                if seed == 0 and pipe.current_block == 1:
                    pipe._interrupt = True
                    together.abort()
            return {}

        def until_the_other_ends(*args):
            try:
                return on_step_end(*args)
            except threading.BrokenBarrierError:
                return {}

        sigmas = [1.0, 0.5] if seed else [0.9, 0.6, 0.3]
        results[seed] = list(stream(pipe, seed, sigmas=sigmas, callback_on_step_end=until_the_other_ends))

    threads = [threading.Thread(target=generate, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(results[seed]) for seed in (0, 1)] == [2, 4]
    assert torch.equal(torch.cat(results[1], dim=2), torch.cat(list(stream(pipe, 1, sigmas=[1.0, 0.5])), dim=2))
    # 0.9 is 5 * 0.9 / (1 + 4 * 0.9) after the shift.
    assert seen[0] == [(0, 3, 978), (1, 3, 978)]
    assert seen[1][0] == (0, 2, 1000)


def test_a_call_inside_of_a_callback(pipe, whole):
    inner = []

    def on_step_end(pipe, i, timestep, kwargs):
        if (pipe.current_block, i) == (1, 0):
            inner.append(list(stream(pipe, 1, callback_on_step_end=stop_at(0))))
            assert pipe.current_block == 1 and not pipe.interrupt
        return {}

    outer = torch.cat(list(stream(pipe, 0, callback_on_step_end=on_step_end)), dim=2)
    assert torch.equal(outer, whole[0]) and len(inner[0]) == 1


def test_from_outside_it_ends_all_that_are_under_way(pipe, whole):
    """Streams that wait have no block to end; the next call is a new one."""
    streams = [stream(pipe, seed) for seed in (0, 1)]
    for blocks in streams:
        next(blocks)
    pipe._interrupt = True
    assert [next(blocks, None) for blocks in streams] == [None, None]
    assert torch.equal(torch.cat(list(stream(pipe, 0)), dim=2), whole[0])


def test_from_another_thread(pipe):
    """As a stop button does, while the call is in its second block."""

    def on_step_end(pipe, i, timestep, kwargs):
        if (pipe.current_block, i) == (1, 1):
            button = threading.Thread(target=setattr, args=(pipe, "_interrupt", True))
            button.start()
            button.join()
        return {}

    assert len(list(stream(pipe, 0, callback_on_step_end=on_step_end))) == 2


@pytest.mark.parametrize("step", [0, 2])
def test_the_last_block_is_what_the_model_predicts(pipe, whole, step):
    """Of a block that ends after a step: the clean video by the flow there, not with the noise for the next one."""
    seen = {}

    def on_step_end(pipe, i, timestep, kwargs):
        if pipe.current_block == 1:
            seen[i] = kwargs["latents"].clone()
        return stop_at(1, step)(pipe, i, timestep, kwargs)

    first, last = stream(pipe, 0, callback_on_step_end=on_step_end)
    assert torch.equal(first, whole[0][:, :, :3])
    # A video whose second block has only these steps draws the same noise up to there.
    levels = [1.0, 0.75, 0.5, 0.25][: step + 1]
    short = tiny_pipeline(**ONE_LAYER, sigmas=levels, first_block_sigmas=[1.0, 0.75, 0.5, 0.25])
    expected = list(stream(short, 0))[1]
    assert torch.equal(last, expected)
    assert (last - seen[step]).abs().max() > 0.1


def test_the_last_step_s_replacement_counts(pipe):
    replacement = torch.zeros(1, 4, 3, 4, 6)

    def on_step_end(pipe, i, timestep, kwargs):
        stop_at(0, 3)(pipe, i, timestep, kwargs)
        return {"latents": replacement} if i == 3 else {}

    assert torch.equal(*stream(pipe, 0, callback_on_step_end=on_step_end), replacement)


def test_every_video_of_a_batch_ends_with_the_same_block(pipe):
    """Also if they are generated apart after a cut."""
    prompts = [f"{A}[.75s#] | {B}[2.25s]", f"{A}[3s]"]
    video = pipe(prompts, num_frames=NUM_FRAMES, output_type="latent", callback_on_step_end=stop_at(1)).frames
    assert video.shape[:3] == (2, 4, 6) and video.isfinite().all()


def test_where_the_latest_call_was(pipe):
    list(stream(pipe, 0, sigmas=[1.0, 0.5]))
    assert (pipe.current_block, pipe.num_timesteps, pipe.current_timestep, pipe.interrupt) == (3, 2, None, False)
    other = copy.deepcopy(pipe)
    assert other.current_block is None
    assert len(list(stream(other, 0, callback_on_step_end=stop_at(0)))) == 1
