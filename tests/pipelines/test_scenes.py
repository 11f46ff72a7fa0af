"""Videos of several scenes."""

import pytest
import torch

from astrolabe_diffusers.models.vae_streaming import decode_latents
from tests.reference_causal_wan import ReferenceCausalWan, published_noise
from tests.tiny_pipeline import SMALL, tiny_pipeline


A = "a red circle moves up on a white background"
B = "a blue cross moves left on a gray background"
C = "a green square moves down on a black background"
N = 3
TWO_STEPS = {**SMALL, "sigmas": [1.0, 0.5]}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(**TWO_STEPS, local_attn_size=9, sink_size=3, rope_mode="relative")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def generate(pipe, prompt, output_type="latent", generator=None, **kwargs):
    return pipe(prompt, generator=generator or seeded(), output_type=output_type, **kwargs).frames


@torch.no_grad()
def reference(pipe, texts, seed=0, **kwargs):
    """Latents with one prompt a block."""
    sigmas = pipe.config.sigmas
    shape = (1, 4, N * len(texts), pipe.config.height // 8, pipe.config.width // 8)
    noise, renoise = published_noise(seeded(seed), shape, N, [len(sigmas)] * len(texts))
    encoded = {text: pipe.encode_prompt(text) for text in texts if isinstance(text, str)}
    embeds = [encoded[text] if isinstance(text, str) else text for text in texts]
    slow = ReferenceCausalWan(pipe.transformer.state_dict(), dict(pipe.transformer.config))
    return slow.sample(noise, renoise, embeds, sigmas, **kwargs)


def test_a_soft_scene_changes_only_the_text(pipe):
    latents = generate(pipe, f"{A}[2.3s] | {B}[1.5s] | {C}[.1s]")
    assert latents.shape[2] == N * 6
    assert (latents - reference(pipe, [A] * 3 + [B] * 2 + [C])).abs().max() <= 1e-5
    # What was there before is still seen.
    other = generate(pipe, f"{C}[2.3s] | {B}[1.5s] | {C}[.1s]")
    assert (latents - other)[:, :, N * 3 :].abs().max() > 0.01


def test_nothing_passes_a_hard_cut(pipe):
    first, second = (generate(pipe, f"{text}[2.3s#] | {B}[1.5s]") for text in (A, C))
    assert torch.equal(first[:, :, N * 3 :], second[:, :, N * 3 :])
    assert (first - second)[:, :, : N * 3].abs().max() > 0.01
    # A video of its own would begin with another noise: with the same it is the same.
    generator = seeded()
    noise, _ = published_noise(generator, (1, 4, N * 5, 2, 4), N, [2] * 3)
    alone = generate(pipe, B, generator=generator, latents=noise[:, :, N * 3 :], num_frames=21)
    assert torch.equal(first[:, :, N * 3 :], alone)


@pytest.mark.parametrize(
    "prompt,video,steps",
    [
        (f"{A}[1.5s] | {B}[1.5s]", None, [4, 2, 2, 2]),
        (f"{A}[1.5s#] | {B}[1.5s]", None, [4, 2, 4, 2]),
        (f"{A}[1.5s#] | {B}[1.5s]", 6, [4, 2]),
        (f"{A}[.75s#] | {B}[2.25s]", 6, [4, 2]),
        (f"{A}[2.25s#] | {B}[.75s]", 3, [4, 2, 4]),
    ],
)
def test_what_begins_takes_the_steps_of_the_first_block(prompt, video, steps):
    """At the beginning, after given frames and after a cut; a model of two steps makes it in four."""
    pipe, seen = tiny_pipeline(**TWO_STEPS, first_block_sigmas=[1.0, 0.75, 0.5, 0.25]), []

    def count(pipe, step, timestep, values):
        seen[pipe.current_block :] = [pipe.num_timesteps]
        return {}

    video = video and torch.randn(1, 4, video, 2, 4, generator=seeded())
    seen.extend([0] * (0 if video is None else video.shape[2] // N))
    generate(pipe, prompt, video=video, callback_on_step_end=count)
    assert [number for number in seen if number] == steps


def test_the_decoder_starts_anew_at_a_cut(pipe):
    prompt = f"{A}[1.5s#] | {B}[1.5s]"
    latents, frames = generate(pipe, prompt), generate(pipe, prompt, "pt")
    assert frames.shape[1] == 9 + 12 * 3
    scenes = [(decode_latents(pipe.vae, x).detach() / 2 + 0.5).transpose(1, 2) for x in latents.split(2 * N, dim=2)]
    torch.testing.assert_close(frames[:, :21], scenes[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(frames[:, 24:], scenes[1], atol=1e-5, rtol=0)
    # Its first latent frame is one picture, held as long as four.
    assert all(torch.equal(frames[:, i], frames[:, 24]) for i in (21, 22, 23))


def test_every_video_has_its_own_scenes(pipe):
    prompts = [f"{A}[.8s#] | {B}[2.3s]", f"{C}[.8s] | {A}[2.3s]", f"{B}[1.5s#] | {A}[.8s#] | {C}", A]
    generators = [seeded(seed) for seed in range(4)]
    frames = generate(pipe, prompts, "pt", generator=generators, num_frames=45)
    for seed, prompt in enumerate(prompts):
        alone = generate(pipe, prompt, "pt", generator=seeded(seed), num_frames=45)
        assert (frames[seed : seed + 1] - alone).abs().max() < 1e-4
    twice = generate(pipe, prompts[2], generator=[seeded(2), seeded(5)], num_frames=45, num_videos_per_prompt=2)
    assert (twice[:1] - generate(pipe, prompts[2], generator=seeded(2), num_frames=45)).abs().max() < 1e-5


def test_parted_videos_keep_their_own_past():
    """A window that has been full, a re-encoded context: what is parted is as good as alone."""
    for config in ({"local_attn_size": 6, "sink_size": 3, "rope_mode": "relative"}, {"num_context_frames": 3}):
        pipe = tiny_pipeline(**TWO_STEPS, **config)
        prompts = [f"{A}[2.3s] | {B}[2.3s]", f"{A}[2.3s#] | {B}[2.3s]"]
        latents = generate(pipe, prompts, generator=[seeded(0), seeded(1)])
        for seed, prompt in enumerate(prompts):
            assert (latents[seed : seed + 1] - generate(pipe, prompt, generator=seeded(seed))).abs().max() < 1e-5


def test_length(pipe):
    prompt = f"{A}[.75s] | {B}[.75s]"
    assert generate(pipe, prompt, "pt").shape[1] == 21
    # Given, the last scene is stretched, or the video ends earlier.
    assert (generate(pipe, prompt, num_frames=45) - reference(pipe, [A, B, B, B])).abs().max() <= 1e-5
    assert generate(pipe, prompt, num_frames=9).shape[2] == N
    # One scene with a duration; the longest of several; and a plain prompt as ever.
    assert generate(pipe, f"{A}[1.6s]").shape[2] == 2 * N
    assert generate(pipe, [f"{A}[.75s]", f"{B}[2.25s]"]).shape == (2, 4, 3 * N, 2, 4)
    assert generate(pipe, A, "pt").shape[1] == pipe.config.num_frames


def test_positions_count_from_the_cut():
    pipe = tiny_pipeline(**TWO_STEPS, rope_max_seq_len=9)
    with pytest.raises(ValueError, match="9 absolute positions: at most 33 frames without a cut"):
        generate(pipe, f"{A}[3s] | {B}[1.5s]")
    assert generate(pipe, f"{A}[2.25s#] | {B}[2.25s]").shape[2] == 18


def test_a_slip_is_named(pipe):
    with pytest.raises(ValueError, match="prompt, character 3"):
        generate(pipe, "a [red] car")
    with pytest.raises(ValueError, match="no text"):
        pipe.stream([A, f"{A} | "])
