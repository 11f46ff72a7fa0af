"""Videos of a model with a memory bank: streams, batches, scenes and changes of the prompt."""

import pytest
import torch

from astrolabe_diffusers.models.kv_cache_memory_bank import BANK_UPDATES
from tests.pipelines.test_scenes import TWO_STEPS, A, B, C, N, generate, seeded
from tests.pipelines.test_stream import frames_of, switched
from tests.reference_causal_wan import published_noise
from tests.reference_memory_bank import ReferenceMemoryBank
from tests.tiny_pipeline import tiny_pipeline


# Full after three blocks; window and sink are full after two.
BANK = {**TWO_STEPS, "local_attn_size": 9, "sink_size": 3, "memory_bank_size": 2, "memory_bank_interval": 1}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(**BANK)


@torch.no_grad()
def reference(pipe, texts, **kwargs):
    """Latents with one prompt a block."""
    noise, renoise = published_noise(seeded(), (1, 4, N * len(texts), 2, 4), N, [2] * len(texts))
    embeds = [pipe.encode_prompt(text) for text in texts]
    slow = ReferenceMemoryBank(pipe.transformer.state_dict(), dict(pipe.transformer.config))
    return slow.sample(noise, renoise, embeds, pipe.config.sigmas, **kwargs), slow


@pytest.mark.parametrize("update", BANK_UPDATES)
@pytest.mark.parametrize("at", [2, 5])
def test_recache_equals_the_reference(at, update):
    """Frames in memory are encoded anew and see the bank, which stays; at 5 it is full and chosen from."""
    pipe, texts = tiny_pipeline(**BANK, memory_bank_update=update), [A] * at + [B] * 4
    rolled = switched(pipe, at, B, blocks=at + 4)
    assert (rolled - reference(pipe, texts)[0]).abs().max() <= 1e-5
    for global_sink in (True, False) if at == 5 else (True,):
        result = switched(pipe, at, B, blocks=at + 4, transition="recache", global_sink=global_sink)
        wanted, slow = reference(pipe, texts, recache_at=at, global_sink=global_sink)
        assert (result - wanted).abs().max() <= 1e-5
        assert (result - rolled)[:, :, at * N :].abs().max() > 1e-3
    if at == 5 and update != "once":
        # Whatever the text: the newest of the frames in the bank left before block 5.
        assert {left for _, _, block, left in slow.left if block == 5} == {3 * N}


def test_a_stream_is_the_call_and_a_batch_its_videos(pipe):
    prompts, scenes = [A, f"{B}[2.3s] | {C}[3s]", C], [[A] * 7, [B] * 3 + [C] * 4, [C] * 7]
    together = {"num_frames": frames_of(7), "generator": [seeded(i) for i in range(3)]}
    batch = generate(pipe, prompts, **together)
    together["generator"] = [seeded(i) for i in range(3)]
    assert torch.equal(torch.cat([*pipe.stream(prompts, output_type="latent", **together)], dim=2), batch)
    for i, prompt in enumerate(prompts):
        alone = generate(pipe, prompt, num_frames=frames_of(7), generator=seeded(i))
        assert (alone - batch[i : i + 1]).abs().max() <= 1e-5
    assert (reference(pipe, scenes[0])[0] - batch[:1]).abs().max() <= 1e-5


def test_a_cut_forgets_the_bank(pipe):
    """Also in a batch, where the other videos keep theirs."""
    first, second = (generate(pipe, f"{text}[3.75s#] | {B}[3s]") for text in (A, C))
    assert first.shape[2] == 9 * N and torch.equal(first[:, :, 5 * N :], second[:, :, 5 * N :])
    generators = [seeded(), seeded(1)]
    batch = generate(pipe, [f"{A}[3.75s#] | {B}[3s]", A], num_frames=frames_of(9), generator=generators)
    assert (batch[:1] - first).abs().max() <= 1e-5
    alone = generate(pipe, A, num_frames=frames_of(9), generator=seeded(1))
    assert (batch[1:] - alone).abs().max() <= 1e-5


@pytest.mark.slow
def test_compiled():
    """Choosing is part of the graphs; `compile` meets them all."""
    pipe = tiny_pipeline(**BANK)
    expected = [switched(pipe, 6, B, blocks=9, transition=transition) for transition in ("roll", "recache")]
    torch._dynamo.reset()
    pipe.compile(A, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for transition, wanted in zip(("roll", "recache"), expected):
            assert (switched(pipe, 6, B, blocks=9, transition=transition) - wanted).abs().max() <= 1e-6
    torch._dynamo.reset()
