"""Videos of a pipeline with a second expert that writes the cache, against the slow reference."""

import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline

from astrolabe_diffusers import CausalWanPipeline, CausalWanTransformer3DModel
from astrolabe_diffusers.generation.config import GenerationConfig
from astrolabe_diffusers.generation.run import video_settings
from astrolabe_diffusers.layouts.published_models import PUBLISHED_MODELS
from astrolabe_diffusers.models.vae_streaming import encode_video
from astrolabe_diffusers.pipelines.loading import base_digest, load_from, load_text_encoder, weights_digest
from astrolabe_diffusers.rollout.prompts import Prompt
from astrolabe_diffusers.rollout.samples import Sample
from astrolabe_diffusers.rollout.sampling import SharedPastSampler
from astrolabe_diffusers.rollout.seeds import seeded_generator
from tests.own_transformer import OwnTransformer
from tests.pipelines.test_block_generation import server_context
from tests.pipelines.test_scenes import A, B, C, generate, seeded
from tests.tiny_pipeline import SMALL, tiny_pipeline, tiny_transformer
from tests.two_experts import PROMPT, WINDOWS, expected_latents, sizes_of, two_expert_pipeline


TWO_STEPS = {**SMALL, "sigmas": [1.0, 0.5]}
CHUNKWISE = {**TWO_STEPS, **WINDOWS["chunkwise"]}


@pytest.fixture(scope="module")
def pipe():
    return two_expert_pipeline(**CHUNKWISE)


def num_frames(pipe, blocks):
    return 4 * blocks * pipe.transformer.config.num_frames_per_block - 3


@pytest.mark.parametrize("window", WINDOWS)
def test_equals_the_reference(window):
    """Over the first frames that leave the window, and more."""
    pipe = two_expert_pipeline(**TWO_STEPS, **WINDOWS[window])
    result = generate(pipe, PROMPT, num_frames=num_frames(pipe, 7))
    assert (result - expected_latents(pipe, [PROMPT] * 7)).abs().max() <= 1e-5
    memory, pipe.memory_transformer = pipe.memory_transformer, None
    n = pipe.transformer.config.num_frames_per_block
    alone = generate(pipe, PROMPT, num_frames=num_frames(pipe, 7))
    assert torch.equal(alone[:, :, :n], result[:, :, :n]) and (alone - result)[:, :, n:].abs().max() > 1e-2
    pipe.memory_transformer, pipe.transformer = pipe.transformer, memory
    assert (generate(pipe, PROMPT, num_frames=num_frames(pipe, 7)) - result).abs().max() > 1e-2


@pytest.mark.parametrize("recipe,blocks", [("sgf-plus-framewise", 23), ("sgf-plus-chunkwise", 6)])
def test_published_recipes(recipe, blocks):
    """In their own windows, two blocks beyond them, and in four steps."""
    published = PUBLISHED_MODELS[recipe]
    pipe = two_expert_pipeline(**SMALL, **published.transformer, **published.pipeline, num_layers=1)
    assert pipe.config.sigmas == [1.0, 0.75, 0.5, 0.25] and pipe.is_endless
    result = generate(pipe, PROMPT, num_frames=num_frames(pipe, blocks))
    assert (result - expected_latents(pipe, [PROMPT] * blocks)).abs().max() <= 1e-5


def test_continuations_of_one_past(pipe):
    """They share the cache that the memory transformer has written, and it goes on writing theirs."""
    size = {"height": 16, "width": 32, "num_frames": 81}
    samples = [Sample(Prompt(PROMPT), 0, (7, 0, 0, k)) for k in range(2)]
    sampler = SharedPastSampler(pipe, size, num_past_frames=12)
    text = pipe.encode_prompt([PROMPT] * 2)
    latents, _ = sampler(text, samples)
    for sample, video in zip(samples, latents.split(1)):
        generators = [seeded_generator("sample", *sample.key)]
        arguments = {"prompt_embeds": text[:1], "video": video[:, :, :12], "generator": generators, **size}
        assert (pipe(**arguments, output_type="latent").frames - video).abs().max() <= 1e-5


def test_transformers_of_a_user_s_own():
    """Of the contract alone, which knows no `"store"`."""
    torch.manual_seed(0)
    first, second = OwnTransformer(), OwnTransformer()
    pipe = tiny_pipeline(**TWO_STEPS, transformer=first)
    alone = generate(pipe, PROMPT, num_frames=33)
    pipe.memory_transformer = first
    assert torch.equal(generate(pipe, PROMPT, num_frames=33), alone)
    pipe.memory_transformer = second
    other = generate(pipe, PROMPT, num_frames=33)
    assert torch.equal(other[:, :, :3], alone[:, :, :3]) and (other - alone)[:, :, 3:].abs().max() > 1e-3


def test_a_copy_is_no_second_expert():
    """It takes a pass more each block, and makes the same video."""
    pipe = two_expert_pipeline(copy=True, **CHUNKWISE)
    result = generate(pipe, PROMPT, num_frames=69)
    pipe.memory_transformer = None
    assert (generate(pipe, PROMPT, num_frames=69) - result).abs().max() <= 1e-5


def test_which_pass_is_whose(pipe):
    modes = []
    hooks = [
        expert.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: modes.append((name, kwargs["kv_cache_mode"])), with_kwargs=True
        )
        for name, expert in pipe.experts.items()
    ]
    generate(pipe, PROMPT, num_frames=33)
    for hook in hooks:
        hook.remove()
    read, store = ("transformer", "read"), ("memory_transformer", "store")
    assert modes == [read, read, store, read, read, store, read, read]


def test_given_frames_are_the_memory_expert_s():
    pipe = two_expert_pipeline(**TWO_STEPS, **WINDOWS["framewise"])
    image = np.random.default_rng(0).random((1, 16, 32, 3)).astype("float32")
    given = encode_video(pipe.vae, torch.from_numpy(image).permute(3, 0, 1, 2)[None] * 2 - 1)
    result = generate(pipe, PROMPT, image=image, num_frames=25)
    wanted = expected_latents(pipe, [PROMPT] * 7, num_given=1, given=given)
    assert (result - wanted).abs().max() <= 1e-5
    # Or three blocks as latents.
    given = result[:, :, :3]
    wanted = expected_latents(pipe, [PROMPT] * 7, num_given=3, given=given)
    assert (generate(pipe, PROMPT, video=given, num_frames=25) - wanted).abs().max() <= 1e-5


def test_a_batch_is_its_videos(pipe):
    together = pipe([A, B], num_frames=69, generator=[seeded(0), seeded(1)], output_type="latent").frames
    for i, prompt in enumerate((A, B)):
        alone = generate(pipe, prompt, generator=[seeded(i)], num_frames=69)
        assert (together[i : i + 1] - alone).abs().max() <= 1e-5


def test_a_stream_is_the_call(pipe):
    call = generate(pipe, PROMPT, num_frames=69, output_type="pt")
    stream = pipe.stream(PROMPT, num_frames=69, generator=seeded(), output_type="pt")
    assert torch.equal(torch.cat(list(stream), dim=1), call)


def test_streams_in_turns(pipe):
    """Two caches, and one pair of experts."""
    expected = [generate(pipe, prompt, num_frames=33) for prompt in (A, B)]
    streams = [pipe.stream(p, num_frames=33, generator=seeded(), output_type="latent") for p in (A, B)]
    pieces = list(zip(*streams))
    for parts, whole in zip(zip(*pieces), expected):
        assert torch.equal(torch.cat(parts, dim=2), whole)


@pytest.mark.parametrize("at,global_sink", [(2, True), (5, True), (5, False)])
def test_recache_is_the_memory_expert_s(pipe, at, global_sink):
    stream = pipe.stream(A, num_frames=93, generator=seeded(), output_type="latent")
    pieces = [next(stream) for _ in range(at)]
    stream.set_prompt(B, "recache", global_sink=global_sink)
    result = torch.cat([*pieces, *stream], dim=2)
    wanted = expected_latents(pipe, [A] * at + [B] * (8 - at), recache_at=at, global_sink=global_sink)
    assert (result - wanted).abs().max() <= 1e-5


def test_soft_scenes(pipe):
    """The block before a change enters the cache with its own prompt."""
    result = generate(pipe, f"{A}[2.3s] | {B}[1.5s] | {C}[.1s]")
    assert (result - expected_latents(pipe, [A] * 3 + [B] * 2 + [C])).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "prompts",
    [
        [f"{A}[1.5s#] | {B}[2.2s]", f"{C}[3.7s]"],
        # Parts of unequal size, whose blocks are stored with texts of their own.
        [f"{A}[1.5s] | {B}[1.5s flush] | {C}[3s]", f"{B}[1.5s flush] | {C}[4.5s]", f"{C}[3s recache] | {A}[3s]"],
    ],
)
def test_videos_that_part_keep_their_past(pipe, prompts):
    together = pipe(prompts, generator=[seeded(i) for i in range(len(prompts))], output_type="latent").frames
    for i, prompt in enumerate(prompts):
        assert (together[i : i + 1] - generate(pipe, prompt, generator=[seeded(i)])).abs().max() <= 1e-5


@torch.no_grad()
def test_a_context_that_is_encoded_anew():
    pipe = two_expert_pipeline(**TWO_STEPS, num_context_frames=3)
    wanted = expected_latents(pipe, [PROMPT] * 4, encode_context=server_context(pipe.vae))
    assert (generate(pipe, PROMPT, num_frames=45) - wanted).abs().max() <= 1e-5


def test_saved_and_loaded(pipe, tmp_path):
    expected = generate(pipe, PROMPT, num_frames=33)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded, CausalWanPipeline)
    assert isinstance(loaded.memory_transformer, CausalWanTransformer3DModel)
    assert (generate(loaded, PROMPT, num_frames=33) - expected).abs().max() <= 1e-5
    assert base_digest(loaded) == base_digest(pipe) == weights_digest(pipe.denoiser, pipe.vae, pipe.text_encoder)
    again = CausalWanPipeline.from_pipe(loaded)
    assert (generate(again, PROMPT, num_frames=33) - expected).abs().max() <= 1e-5
    half = load_from(str(tmp_path), dtype=torch.bfloat16)
    assert half.memory_transformer.dtype == torch.bfloat16
    assert generate(half, PROMPT, num_frames=33).isfinite().all()
    plain = CausalWanPipeline.from_pretrained(tmp_path, memory_transformer=None)
    assert plain.memory_transformer is None and base_digest(plain) != base_digest(pipe)
    plain.save_pretrained(tmp_path / "plain")
    assert DiffusionPipeline.from_pretrained(tmp_path / "plain").memory_transformer is None
    # And one that was put there later.
    plain.memory_transformer = loaded.memory_transformer
    plain.save_pretrained(tmp_path / "later")
    later = DiffusionPipeline.from_pretrained(tmp_path / "later")
    assert (generate(later, PROMPT, num_frames=33) - expected).abs().max() <= 1e-5


def test_to_and_offloading():
    pipe = two_expert_pipeline(**CHUNKWISE)
    expected, device = generate(pipe, PROMPT, num_frames=33), torch.device("cpu")
    pipe.enable_group_offload(device, device, offload_type="leaf_level")
    assert torch.equal(generate(pipe, PROMPT, num_frames=33), expected)
    with pytest.raises(ValueError, match="offloaded one by one cannot be compiled"):
        pipe.compile()
    pipe = two_expert_pipeline(**CHUNKWISE).to(torch.bfloat16)
    assert {expert.dtype for expert in pipe.experts.values()} == {torch.bfloat16}


@pytest.mark.slow
def test_compiled():
    """All of it by one call, and no graph is missing afterwards."""
    pipe = two_expert_pipeline(**TWO_STEPS, local_attn_size=6, num_layers=1)
    expected = generate(pipe, PROMPT, num_frames=81)
    assert pipe.compile(backend="eager") > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(generate(pipe, PROMPT, num_frames=81), expected)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"num_frames_per_block": 1}, "`num_frames_per_block` is 1 and not 3"),
        ({"sink_size": 0}, "`sink_size` is 0 and not 3"),
        ({"num_layers": 3}, "`num_layers` is 3 and not 2"),
        ({"num_attention_heads": 4, "attention_head_dim": 6}, "`num_attention_heads` is 4 and not 2"),
    ],
)
def test_experts_that_cannot_share_a_cache(pipe, changes, message):
    other = tiny_transformer(**sizes_of(pipe.transformer) | changes)
    message = f"`memory_transformer` cannot write the cache of `transformer`: {message}"
    with pytest.raises(ValueError, match=message):
        CausalWanPipeline(**pipe.components | {"memory_transformer": other})
    later = CausalWanPipeline(**pipe.components)
    later.memory_transformer = other
    with pytest.raises(ValueError, match=message):
        later.stream(PROMPT)


@pytest.mark.usefixtures("own_precision")
def test_both_are_under_autocast(pipe):
    """As accelerate prepares a model, evaluation and training in bf16: the pair is the same one afterwards."""
    prepared = two_expert_pipeline(**CHUNKWISE)
    assert prepared.denoiser is prepared.denoiser
    accelerator = Accelerator(mixed_precision="bf16")
    accelerator.prepare_model(prepared.denoiser, evaluation_mode=True)
    seen = []
    for expert in prepared.experts.values():
        expert.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    generate(prepared, PROMPT, num_frames=21)
    assert len(seen) == 5 and all(seen)
    AcceleratorState._reset_state(reset_partial_state=True)
    before, prepared.memory_transformer = prepared.denoiser, pipe.memory_transformer
    assert prepared.denoiser is not before and prepared.denoiser.memory_transformer is pipe.memory_transformer


def test_videos_of_a_folder_know_both(tmp_path):
    """`astrolabe generate` makes them anew when the memory transformer is another one."""
    digests = []
    for seed in (0, 1):
        pipe = two_expert_pipeline(**CHUNKWISE)
        pipe.memory_transformer.proj_out.bias.data[0] += seed
        config = GenerationConfig(model="m", prompt="a", output_dir=str(tmp_path))
        digests.append(video_settings(config, pipe, "float32")["weights"])
    assert digests[0] != digests[1]


def test_a_text_encoder_comes_alone(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    for folder in ("transformer", "memory_transformer", "vae"):
        shutil.rmtree(tmp_path / folder)
    alone = load_text_encoder(str(tmp_path), Accelerator(mixed_precision="no"))
    assert torch.equal(alone.encode_prompt(PROMPT), pipe.encode_prompt(PROMPT))
    assert alone.denoiser is None and alone.experts == {}
