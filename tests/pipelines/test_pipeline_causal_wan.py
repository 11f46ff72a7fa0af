"""CausalWanPipeline: whole videos, streams, noise, prompts, callbacks, errors."""

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from peft import LoraConfig

from astrolabe_diffusers import CausalWanPipelineOutput
from tests.reference_causal_wan import ReferenceCausalWan, published_noise
from tests.tiny_pipeline import SMALL, tiny_pipeline


PROMPTS = ["a red circle moves left on a black background", "a green cross moves up on a white background"]
STEPS = 4
ONE_LAYER = {**SMALL, "num_layers": 1}


@pytest.fixture(scope="module")
def pipe():
    """3 latent frames a block, window of 6 with a sink of 1, 9 latent frames: 33 frames in 3 blocks."""
    return tiny_pipeline(**ONE_LAYER, num_frames_per_block=3, local_attn_size=6, sink_size=1, num_frames=33)


def seeded(*seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators[0] if len(generators) == 1 else generators


def raw(vae, latents):
    mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    return latents * std.view(-1, 1, 1, 1) + mean.view(-1, 1, 1, 1)


@torch.no_grad()
def encode(pipe, prompts):
    return pipe.encode_prompt(prompts)


def to_frames(video):
    """Decoded [B, 3, F, H, W] in [-1, 1] -> [B, F, 3, H, W] in [0, 1]."""
    return (video / 2 + 0.5).clamp(0, 1).transpose(1, 2)


def assert_one_line(error, *words):
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message


VARIANTS = {
    "frame_by_frame": dict(num_frames_per_block=1, local_attn_size=3, sink_size=1, num_frames=21, height=32, width=32),
    "pairs": dict(num_frames_per_block=2, num_frames=21, height=48, width=32),
    "threes": dict(
        num_frames_per_block=3,
        local_attn_size=6,
        sink_size=2,
        rope_mode="relative",
        num_frames=45,
        height=16,
        width=32,
    ),
    "patched_vae": dict(num_frames_per_block=3, vae_patch_size=2, num_frames=21, height=32, width=64),
    "wan2.2_vae": dict(num_frames_per_block=3, vae_patch_size=2, vae_is_residual=True, height=64, width=32),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_stream_equals_call_equals_whole_decode(variant):
    pipe = tiny_pipeline(**VARIANTS[variant], num_layers=1, sigmas=[1.0, 0.5])
    n, num_frames = pipe.transformer.config.num_frames_per_block, pipe.config.num_frames
    whole = pipe(PROMPTS, generator=seeded(0), output_type="pt").frames
    pieces = list(pipe.stream(PROMPTS, generator=seeded(0), output_type="pt"))
    assert [piece.shape[1] for piece in pieces] == [4 * n - 3] + [4 * n] * (num_frames // (4 * n))
    assert torch.equal(torch.cat(pieces, dim=1), whole)
    assert whole.shape == (2, num_frames, 3, pipe.config.height, pipe.config.width)

    pixels = pipe(PROMPTS, generator=seeded(0), output_type="uint8").frames
    assert torch.equal(pixels, (whole * 255).round().byte().permute(0, 1, 3, 4, 2)) and pixels.is_contiguous()

    latents = pipe(PROMPTS, generator=seeded(0), output_type="latent").frames
    with torch.no_grad():
        decoded = pipe.vae.decode(raw(pipe.vae, latents)).sample
    # Ours takes sums in another order, and the random weights make much of it.
    torch.testing.assert_close(to_frames(decoded), whole, atol=5e-5, rtol=0)
    # The videos of two prompts, and the frames of one video, are not all the same.
    assert (whole[0] - whole[1]).abs().max() > 0.01
    assert (whole[:, -1] - whole[:, -2]).abs().max() > 0.01


@pytest.mark.parametrize("sigmas", [None, [1.0, 0.4], [1.0]])
@pytest.mark.parametrize("variant", ["frame_by_frame", "pairs", "threes"])
def test_equals_reference_sampler(variant, sigmas):
    """The same noises: first all initial noise, then block by block one noise for each step but the last."""
    pipe = tiny_pipeline(**VARIANTS[variant])
    config = pipe.transformer.config
    out = pipe(PROMPTS, generator=seeded(3), sigmas=sigmas, output_type="latent").frames

    n, steps = config.num_frames_per_block, len(sigmas or range(STEPS))
    noise, renoise = published_noise(seeded(3), out.shape, n, [steps] * (out.shape[2] // n))
    text = encode(pipe, PROMPTS)
    reference = ReferenceCausalWan(pipe.transformer.state_dict(), dict(config))
    with torch.no_grad():
        expected = reference.sample(noise, renoise, text, sigmas or (1.0, 0.75, 0.5, 0.25), shift=5.0)
    assert expected.std() > 0.3
    error = (out.double() - expected).abs().max().item()
    assert error <= 1e-5


def test_given_latents_are_the_initial_noise(pipe):
    """Passing the noise that the generator would have drawn leaves the generator at the re-noising."""
    drawn = pipe(PROMPTS, generator=seeded(5), output_type="latent").frames
    generator = seeded(5)
    noise, _ = published_noise(generator, drawn.shape, 3, [])
    assert torch.equal(pipe(PROMPTS, generator=generator, latents=noise, output_type="latent").frames, drawn)


def test_generators_per_sample(pipe):
    """A video with its own generator does not depend on the batch it is made in."""
    prompts = [*PROMPTS, PROMPTS[0]]
    together = pipe(prompts, generator=seeded(1, 2, 3), output_type="latent").frames
    assert (together[0] - together[2]).abs().max() > 0.1
    for i, prompt in enumerate(prompts):
        alone = pipe(prompt, generator=seeded(i + 1), output_type="latent").frames
        assert (alone[0] - together[i]).abs().max() <= 1e-5


def test_num_videos_per_prompt(pipe):
    a = pipe(PROMPTS, num_videos_per_prompt=2, generator=seeded(1, 2, 3, 4), output_type="latent").frames
    b = pipe([PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, generator=seeded(1, 2, 3, 4), output_type="latent").frames
    assert torch.equal(a, b)
    embeds = encode(pipe, PROMPTS)
    c = pipe(prompt_embeds=embeds, num_videos_per_prompt=2, generator=seeded(1, 2, 3, 4), output_type="latent").frames
    assert torch.equal(a, c)


def test_encode_prompt_equals_diffusers(pipe):
    wan = WanPipeline(pipe.tokenizer, pipe.text_encoder, pipe.vae, pipe.scheduler, pipe.transformer)
    prompts = ["a  red circle &amp;amp; a\tblue cross ", "triangle", PROMPTS[0]]
    with torch.no_grad():
        for length in (16, 5):
            expected, _ = wan.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=length)
            assert torch.equal(pipe.encode_prompt(prompts, max_sequence_length=length), expected)
        # Where nothing is said, the length is the pipeline's.
        expected, _ = wan.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=16)
        assert torch.equal(pipe.encode_prompt(prompts), expected)
        assert (expected[1, 2:] == 0).all() and expected[1, :2].abs().max() > 0.01
        twice = pipe.encode_prompt(prompts, num_videos_per_prompt=2)
        assert torch.equal(twice[0::2], expected) and torch.equal(twice[1::2], expected)


def test_prompt_matters(pipe):
    a, b = (pipe(prompt, generator=seeded(0), output_type="latent").frames for prompt in PROMPTS)
    assert (a - b).abs().max() > 0.1
    short = pipe(PROMPTS[0], generator=seeded(0), output_type="latent", max_sequence_length=10).frames
    assert (short - a).abs().max() > 1e-3


def test_output_types(pipe):
    def run(output_type, **kwargs):
        return pipe(PROMPTS, generator=seeded(0), num_frames=21, output_type=output_type, **kwargs)

    result = run("pt")
    assert isinstance(result, CausalWanPipelineOutput)
    pt = result.frames
    assert torch.is_tensor(pt) and pt.shape == (2, 21, 3, 16, 32) and 0 <= pt.min() < pt.max() <= 1
    array = run("np").frames
    assert isinstance(array, np.ndarray) and array.shape == (2, 21, 16, 32, 3)
    assert np.array_equal(array, pt.permute(0, 1, 3, 4, 2).numpy())
    assert np.array_equal(pipe(PROMPTS, generator=seeded(0), num_frames=21).frames, array)  # the default
    images = run("pil").frames
    assert [len(video) for video in images] == [21, 21] and images[0][0].size == (32, 16)
    assert np.abs(np.asarray(images[1][20]) / 255 - array[1, 20]).max() <= 0.51 / 255
    latents = run("latent").frames
    assert latents.shape == (2, 4, 6, 2, 4) and latents.dtype == torch.float32
    as_tuple = run("pt", return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], pt)
    pieces = list(pipe.stream(PROMPTS, generator=seeded(0), num_frames=21, output_type="pil"))
    assert [[len(video) for video in piece] for piece in pieces] == [[9, 9], [12, 12]]


def test_streams_in_turns(pipe):
    """Two streams of one pipeline, with other schedules and sizes, and a use of the autoencoder in between."""
    requests = [
        dict(prompt=PROMPTS, sigmas=[1.0, 0.5], height=16, width=16),
        dict(prompt=PROMPTS[0], sigmas=[1.0, 0.8, 0.3]),
    ]
    expected = [pipe(**request, generator=seeded(i), output_type="pt").frames for i, request in enumerate(requests)]
    streams = [pipe.stream(**request, generator=seeded(i), output_type="pt") for i, request in enumerate(requests)]
    pieces = [[], []]
    for _ in range(3):
        for i, stream in enumerate(streams):
            pieces[i].append(next(stream))
            with torch.no_grad():
                pipe.vae.decode(torch.randn(1, 4, 2, 2, 2))
    for i, stream in enumerate(streams):
        assert next(stream, None) is None
        assert torch.equal(torch.cat(pieces[i], dim=1), expected[i])


def test_stream_gives_each_block_at_once(pipe):
    """When a piece arrives, no later block has been started; a closed stream leaves the pipeline as it was."""
    expected = pipe(PROMPTS, generator=seeded(0), output_type="pt").frames
    blocks = []

    def on_step(pipe, step, timestep, kwargs):
        blocks.append(pipe.current_block)
        return {}

    stream = pipe.stream(PROMPTS, generator=seeded(0), output_type="pt", callback_on_step_end=on_step)
    assert blocks == []
    first = next(stream)
    assert blocks == [0] * STEPS
    assert torch.equal(first, expected[:, :9])
    assert torch.is_grad_enabled() and not first.requires_grad
    stream.close()
    assert next(stream, None) is None
    assert blocks == [0] * STEPS
    assert torch.equal(pipe(PROMPTS, generator=seeded(0), output_type="pt").frames, expected)


def test_calls_leave_no_state(pipe):
    config, schedule = dict(pipe.scheduler.config), pipe.scheduler.timesteps.clone()
    a = pipe(PROMPTS, generator=seeded(0), output_type="latent").frames
    b = pipe(PROMPTS, generator=seeded(1), output_type="latent").frames
    pipe(PROMPTS, sigmas=[1.0, 0.3], generator=seeded(1), output_type="latent", num_frames=21)
    assert dict(pipe.scheduler.config) == config and torch.equal(pipe.scheduler.timesteps, schedule)
    assert torch.equal(pipe(PROMPTS, generator=seeded(0), output_type="latent").frames, a)
    assert (a - b).abs().max() > 0.1


# Callbacks and progress


def test_callback_sees_every_step(pipe):
    seen = []

    def on_step(callback_pipe, step, timestep, kwargs):
        assert callback_pipe is pipe and pipe.num_timesteps == STEPS
        assert kwargs["latents"].shape == (2, 4, 3, 2, 4) and kwargs["prompt_embeds"].shape == (2, 16, 32)
        seen.append((pipe.current_block, step, round(float(timestep), 2)))
        return {}

    names = ["latents", "prompt_embeds"]
    watched = pipe(
        PROMPTS,
        generator=seeded(0),
        output_type="latent",
        callback_on_step_end=on_step,
        callback_on_step_end_tensor_inputs=names,
    ).frames
    times = [1000.0, 937.5, 833.33, 625.0]
    assert seen == [(block, step, time) for block in range(3) for step, time in enumerate(times)]
    assert torch.equal(watched, pipe(PROMPTS, generator=seeded(0), output_type="latent").frames)


def test_callback_changes_latents(pipe):
    """What a callback returns is the block: it is put out, and later blocks see it and nothing of what it replaced."""
    replacement = torch.randn(2, 4, 3, 2, 4)

    def on_step(pipe, step, timestep, kwargs):
        return {"latents": replacement} if (pipe.current_block, step) == (0, STEPS - 1) else {}

    noise = torch.randn(2, 4, 9, 2, 4)
    other = noise.clone()
    other[:, :, :3] = torch.randn(2, 4, 3, 2, 4)
    kwargs = dict(output_type="latent", callback_on_step_end=on_step)
    a = pipe(PROMPTS, generator=seeded(0), latents=noise, **kwargs).frames
    b = pipe(PROMPTS, generator=seeded(0), latents=other, **kwargs).frames
    assert torch.equal(a[:, :, :3], replacement)
    assert torch.equal(a, b)
    unchanged = pipe(PROMPTS, generator=seeded(0), latents=noise, output_type="latent").frames
    assert (unchanged[:, :, 3:] - a[:, :, 3:]).abs().max() > 0.01


def test_callback_changes_prompt(pipe):
    """A prompt changed in mid-video acts from there on."""
    new = encode(pipe, PROMPTS[::-1])

    def on_step(pipe, step, timestep, kwargs):
        return {"prompt_embeds": new} if (pipe.current_block, step) == (1, 0) else {}

    changed = pipe(PROMPTS, generator=seeded(0), output_type="latent", callback_on_step_end=on_step).frames
    unchanged = pipe(PROMPTS, generator=seeded(0), output_type="latent").frames
    assert torch.equal(changed[:, :, :3], unchanged[:, :, :3])
    assert (changed[:, :, 3:6] - unchanged[:, :, 3:6]).abs().max() > 0.01


def test_interrupt_ends_the_video(pipe):
    def on_step(pipe, step, timestep, kwargs):
        pipe._interrupt = pipe.current_block == 1
        return {}

    whole = pipe(PROMPTS, generator=seeded(0), output_type="pt").frames
    part = pipe(PROMPTS, generator=seeded(0), output_type="pt", callback_on_step_end=on_step).frames
    assert part.shape[1] == 21
    assert torch.equal(part[:, :9], whole[:, :9])
    assert torch.equal(pipe(PROMPTS, generator=seeded(0), output_type="pt").frames, whole)


def test_progress_bar_counts_blocks(pipe, capsys):
    pipe.set_progress_bar_config(disable=False)
    try:
        pipe(PROMPTS[0], output_type="latent")
    finally:
        pipe.set_progress_bar_config(disable=True)
    assert "3/3" in capsys.readouterr().err
    pipe(PROMPTS[0], output_type="latent")
    assert capsys.readouterr().err == ""


# Precision


def test_bfloat16():
    pipe = tiny_pipeline(**ONE_LAYER, num_frames=21)
    expected = pipe(PROMPTS, generator=seeded(0), output_type="latent").frames
    pipe.to(torch.bfloat16)
    latents = pipe(PROMPTS, generator=seeded(0), output_type="latent").frames
    # The sampler stays in fp32, so the same seed gives the same video up to rounding of the noise and in the models.
    assert latents.dtype == torch.float32
    assert (latents - expected).abs().mean() < 0.1 * expected.abs().mean()
    frames = pipe(PROMPTS, generator=seeded(0)).frames
    assert frames.dtype == np.float32 and frames.shape == (2, 21, 16, 32, 3) and np.isfinite(frames).all()


# Errors, all of them before anything runs


@pytest.fixture(scope="module")
def one_step():
    return tiny_pipeline(height=16, width=16, num_layers=1, vae_num_res_blocks=0, sigmas=[1.0])


@pytest.mark.parametrize("num_frames, rounded", [(240, 237), (20, 9), (22, 21), (32, 21), (np.int64(10), 9)])
def test_frame_counts_are_rounded_down(num_frames, rounded, one_step, caplog):
    """240 and 480 are published; a diffusers pipeline rounds, with a warning."""
    latents, expected = (
        one_step(PROMPTS[0], num_frames=number, generator=seeded(0), output_type="latent").frames
        for number in (num_frames, rounded)
    )
    assert torch.equal(latents, expected)
    assert 4 * latents.shape[2] - 3 == rounded
    assert [record.getMessage() for record in caplog.records] == [
        f"`num_frames={num_frames}` is rounded down to {rounded}: a video is whole blocks of 3 latent frames, 9 "
        "frames for the first and 12 for every other."
    ]


def test_frame_counts_of_other_blocks():
    assert tiny_pipeline(num_frames_per_block=1).round_num_frames(7) == 5
    # The pipeline's own number, and the noise of the rounded one.
    pipe = tiny_pipeline(**ONE_LAYER, num_frames=40)
    assert pipe(PROMPTS[0], latents=torch.randn(1, 4, 9, 2, 4), output_type="pt").frames.shape[1] == 33


@pytest.mark.parametrize("num_frames", [0, -9, 8, 1, 21.0, "21", float("nan")])
def test_frame_counts_of_no_video(pipe, num_frames):
    for method in (pipe, pipe.stream):
        with pytest.raises(ValueError) as error:
            method(PROMPTS, num_frames=num_frames)
        assert_one_line(error, "`num_frames` must be a whole number of at least 9, not", num_frames)


@pytest.mark.parametrize("size", [dict(height=40), dict(width=50), dict(height=0), dict(height=-16), dict(width="a")])
def test_resolutions(pipe, size):
    with pytest.raises(ValueError) as error:
        pipe.stream(PROMPTS, **size)
    assert_one_line(error, 16, *size.values())


def test_resolution_of_patched_vae():
    pipe = tiny_pipeline(vae_patch_size=2, height=64, width=64)
    with pytest.raises(ValueError) as error:
        pipe(PROMPTS, height=48)
    assert_one_line(error, "height", 32, 48)


def test_input_errors(pipe):
    embeds = torch.zeros(1, 16, 32)
    cases = [
        (dict(), ("prompt", "prompt_embeds")),
        (dict(prompt=PROMPTS, prompt_embeds=embeds), ("prompt", "prompt_embeds")),
        (dict(prompt=3), ("prompt", "int")),
        (dict(prompt=[]), ("prompt", "empty list")),
        (dict(prompt=PROMPTS, num_videos_per_prompt=0), ("num_videos_per_prompt", "at least 1", 0)),
        (dict(prompt_embeds=embeds[0]), ("prompt_embeds", "(batch, tokens, 32)", "(16, 32)")),
        (dict(prompt_embeds=embeds[..., :8]), ("prompt_embeds", "(batch, tokens, 32)", "(1, 16, 8)")),
        (dict(prompt_embeds=embeds / 0), ("prompt_embeds", "NaN")),
        (dict(prompt=PROMPTS, latents=torch.full((2, 4, 9, 2, 4), float("inf"))), ("latents", "infinite")),
        (dict(prompt=PROMPTS, output_type="mp4"), ("output_type", "np", "pil", "pt", "latent", "mp4")),
        (
            dict(prompt=PROMPTS, callback_on_step_end_tensor_inputs=["latents", "noise"]),
            ("callback_on_step_end_tensor_inputs", "latents", "prompt_embeds", "noise"),
        ),
        (dict(prompt=PROMPTS, generator=seeded(1, 2, 3)), ("generator", 3, 2)),
        (dict(prompt=PROMPTS, latents=torch.zeros(2, 4, 3, 2, 4)), ("latents", "(2, 4, 9, 2, 4)", "(2, 4, 3, 2, 4)")),
    ]
    for arguments, words in cases:
        for method in (pipe, pipe.stream):
            with pytest.raises(ValueError) as error:
                method(**arguments)
            assert_one_line(error, *words)


def test_video_longer_than_the_positions():
    """Said before the first block is computed, not in the middle of the video."""
    pipe = tiny_pipeline(**ONE_LAYER, rope_max_seq_len=8, local_attn_size=6)
    with pytest.raises(ValueError) as error:
        next(pipe.stream(PROMPTS, num_frames=33))
    assert_one_line(error, 8, "relative")
    relative = tiny_pipeline(**ONE_LAYER, rope_max_seq_len=8, local_attn_size=6, sink_size=1, rope_mode="relative")
    assert relative(PROMPTS, num_frames=57, output_type="latent").frames.isfinite().all()


@pytest.mark.parametrize(
    "arguments",
    [{"past_weight": float("nan")}, {"past_weight": 0}, {"past_weight": 2}, {"frame_rate": "fast"}]
    + [{"height": 0}, {"num_frames": -1}, {"num_context_frames": 0}],
)
def test_settings_of_the_pipeline(arguments):
    (name,) = arguments
    with pytest.raises(ValueError) as error:
        tiny_pipeline(**arguments)
    assert_one_line(error, name, arguments[name])


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_generation_stops_at_the_first_block_that_is_not_finite(part):
    """One value of the last layer of each model, here set in mid-video."""
    pipe = tiny_pipeline(**ONE_LAYER, num_frames=33)
    stream = pipe.stream(PROMPTS[0], output_type="pt")
    next(stream)
    with torch.no_grad():
        list(getattr(pipe, part).parameters())[-1].flatten()[0] = float("nan")
    if part == "text_encoder":
        stream.set_prompt(PROMPTS[1])
    with pytest.raises(FloatingPointError) as error:
        next(stream)
    assert_one_line(error, "frames" if part == "vae" else "latents", "NaN or infinite", "LoRA")
    assert next(stream, None) is None


def test_nothing_is_finite_in_a_lora():
    pipe = tiny_pipeline(**ONE_LAYER, num_frames=33)
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False))
    pipe.transformer.blocks[0].attn1.to_q.lora_B["default"].weight.data.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="latents of a block"):
        pipe(PROMPTS, output_type="latent")
