"""`compile_repeated_blocks(fullgraph=True)`: every recipe, the same videos, and nothing compiled anew as they grow."""

import pytest
import torch

from astrolabe_diffusers.layouts.published_models import PUBLISHED_MODELS
from astrolabe_diffusers.pipelines.block_generation import Sampling
from tests.tiny_pipeline import SMALL, tiny_pipeline, tiny_transformer


# Every published recipe that differs from those before it, and what none of them has.
RECIPES = {"self-forcing": {}}
for name, model in PUBLISHED_MODELS.items():
    settings = {**model.transformer, **model.pipeline}
    settings.pop("num_frames", None)
    if settings not in RECIPES.values():
        RECIPES[name] = settings
RECIPES["ring"] = {"local_attn_size": 6}
RECIPES["relative"] = {"local_attn_size": 7, "sink_size": 1, "rope_mode": "relative"}
RECIPES["relative, one step"] = {**RECIPES["relative"], "sigmas": [1.0]}
RECIPES["memory bank"] = {"local_attn_size": 6, "memory_bank_size": 2, "memory_bank_interval": 1}
RECIPES["past_weight"] = {"local_attn_size": 9, "past_weight": 0.3}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def video(pipe, num_blocks):
    n = pipe.transformer.config.num_frames_per_block
    generator = torch.Generator().manual_seed(0)
    return pipe("a red circle", num_frames=1 + 4 * (n * num_blocks - 1), generator=generator, output_type="latent")[0]


def shared_past_videos(pipe, num_blocks):
    """Two videos that go on from a past of two blocks."""
    n, generator = pipe.transformer.config.num_frames_per_block, torch.Generator().manual_seed(0)
    sampling = Sampling([1.0, 0.5], [1.0, 0.5], max_frames=n * (num_blocks + 2), decode=False)
    past = pipe.block_generator_class(pipe, sampling, [0])
    past.prompt_embeds = pipe.encode_prompt("a red circle")
    noise = torch.randn(num_blocks + 2, 2, 4, n, 4, 4, generator=generator)
    with torch.no_grad():
        for block in noise[:2]:
            past.finish(past.denoise(block[:1], None, generator))
        past.remember()
        videos, blocks = past.share_past(2), []
        for block in noise[2:]:
            blocks.append(videos.denoise(block, None, generator))
            videos.finish(blocks[-1])
    return torch.cat(blocks, dim=2)


def check(pipe, generate, backend="eager", tolerance=0.0, lengths=(5, 8)):
    expected = [generate(pipe, num_blocks) for num_blocks in lengths]
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    # The first video meets all that there is to compile: the first block, a cache that grows, a window that moves on.
    results = [generate(pipe, lengths[0])]
    with torch._dynamo.config.patch(error_on_recompile=True):
        results.append(generate(pipe, lengths[1]))
    for a, b in zip(results, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# Of the others each has the graphs of these (more steps find the text's keys kept, as in the first); all of them
# together take a minute.
FAST = ("self-forcing", "relative, one step")


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in RECIPES]
)
def test_recipes(recipe):
    pipe = tiny_pipeline(**RECIPES[recipe])
    config = pipe.transformer.config
    # So many that the first video fills window, rows and bank.
    filled = max(config.local_attn_size, config.rope_window or 0) // config.num_frames_per_block
    filled = max(filled, config.memory_bank_size * config.memory_bank_interval)
    check(pipe, video, lengths=(max(5, filled + 2), max(8, filled + 4)))


RELATIVE = {"local_attn_size": 12, "sink_size": 3, "rope_mode": "relative"}


@pytest.mark.slow
@pytest.mark.parametrize("config", [{}, RELATIVE, {**RELATIVE, "sink_ema": 0.7}, RECIPES["memory bank"]])
def test_shared_past(config):
    # Past and own frames that happen to be as many have a graph of their own, once.
    check(tiny_pipeline(**config), shared_past_videos, lengths=(6, 6))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["self-forcing", "relative", "memory bank"])
def test_inductor(recipe):
    check(tiny_pipeline(**RECIPES[recipe]), video, "inductor", 1e-4)


# A second layer has graphs of its own.
@pytest.mark.parametrize(
    "recipe,num_layers",
    [("ring", 1), *(pytest.param(name, 2, marks=pytest.mark.slow) for name in ("ring", "relative"))],
)
def test_one_call_has_it_all_compiled(recipe, num_layers):
    """Longer videos, changes of the prompt, cuts: nothing is compiled any more."""
    pipe = tiny_pipeline(**RECIPES[recipe], num_layers=num_layers)
    expected = video(pipe, 12)
    assert pipe.compile(backend="eager") > 0
    assert pipe.transformer.packs_blocks
    n = pipe.transformer.config.num_frames_per_block
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(video(pipe, 12), expected)
        for transition in pipe.transitions:
            with pipe.stream("a red circle", num_frames=1 + 4 * (9 * n - 1)) as stream:
                for block, _ in enumerate(stream):
                    if block in (1, 5):
                        stream.set_prompt("a blue square", transition)


@pytest.mark.parametrize("passes", [["store", "read"], pytest.param(["store+read", "read"], marks=pytest.mark.slow)])
def test_a_part_of_a_cache(passes):
    """Videos of a batch that go on by themselves, and pairs that begin late: graphs that there are already."""
    transformer = tiny_pipeline(local_attn_size=6, num_layers=1).transformer
    transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    generator = torch.Generator().manual_seed(0)
    block, text = torch.randn(2, 4, 3, 2, 4, generator=generator), torch.randn(2, 16, 32, generator=generator)

    @torch.no_grad()
    def go_on(cache, videos, modes):
        for mode in modes:
            latents = block[videos].repeat(1, 1, 1 + (mode == "store+read"), 1, 1)
            arguments = dict(kv_cache=cache, kv_cache_mode=mode, frame_offset=cache.num_frames, return_dict=False)
            flow = transformer(latents, torch.full((len(videos),), 500.0), text[videos], **arguments)[0]
        return flow

    both, one, late = (transformer.new_kv_cache() for _ in range(3))
    go_on(both, [0, 1], [*passes * 3, "store"])
    expected = go_on(one, [1], [*passes * 3, "store", *passes * 2])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for videos in ([1], [1, 1]):
            assert (go_on(both.select(videos), videos, passes * 2) - expected).abs().max() < 1e-5
        assert (go_on(late, [1], ["store"] * 4 + passes * 2) - expected).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["relative, one step", "ring"])
def test_videos_that_part(recipe):
    """Of two videos one is cut: the other goes on by itself, with a part of the cache, as any single video does."""
    pipe = tiny_pipeline(**RECIPES[recipe], **SMALL, num_layers=1)
    n = pipe.transformer.config.num_frames_per_block

    def parting(cut_at):
        first, rest = (blocks * pipe.seconds_per_block for blocks in (cut_at, 9 - cut_at))
        prompts = ["a red circle", f"a red circle[{first}s#] | a blue square[{rest}s]"]
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        return pipe(prompts, num_frames=1 + 4 * (9 * n - 1), generator=generators, output_type="latent")[0]

    expected = [parting(cut_at) for cut_at in (3, 5)]
    pipe.compile(num_videos_per_prompt=2, backend="eager")
    pipe.compile(backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for cut_at, latents in zip((3, 5), expected):
            assert torch.equal(parting(cut_at), latents)


def test_embeddings_compile_too_and_offloaded_layers_do_not():
    pipe = tiny_pipeline(**RECIPES["ring"], num_layers=1)
    embeds = pipe.encode_prompt("a red circle")
    pipe.text_encoder = pipe.tokenizer = None
    assert pipe.compile(prompt_embeds=embeds, backend="eager") > 0
    pipe.transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ValueError, match="offloaded one by one cannot be compiled"):
        pipe.compile(prompt_embeds=embeds)


def test_gradients():
    """Of each block of a longer and longer video, as training takes them: the past is a constant."""
    transformer = tiny_pipeline().transformer
    generator = torch.Generator().manual_seed(0)
    blocks, text = torch.randn(5, 1, 4, 3, 4, 4, generator=generator), torch.randn(1, 16, 32, generator=generator)

    def gradients(num_blocks):
        cache, results = transformer.new_kv_cache(max_frames=15), []
        for block in blocks[:num_blocks]:
            kwargs = dict(kv_cache=cache, frame_offset=cache.num_frames, return_dict=False)
            transformer.zero_grad()
            flow = transformer(block, torch.tensor([500.0]), text, kv_cache_mode="read", **kwargs)[0]
            flow.square().mean().backward()
            results.append(transformer.blocks[0].attn1.to_q.weight.grad.clone())
            with torch.no_grad():
                transformer(block, torch.tensor([0.0]), text, kv_cache_mode="write", **kwargs)
        return torch.stack(results)

    expected = gradients(5)
    transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    gradients(3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(gradients(5), expected, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("no_grad")
def test_models_of_one_process():
    """Whole videos: a graph that was made for another model's blocks and windows is not this one's."""
    names = ("num_frames_per_block", "local_attn_size", "sink_size", "rope_mode", "sink_ema")
    sizes = [(1, -1, 0, "absolute"), (2, 4, 2, "absolute"), (2, 4, 2, "relative")]
    for config in [*((*size, None) for size in sizes), (2, 4, 2, "relative", 0.7)]:
        transformer = tiny_transformer(**dict(zip(names, config)))
        generator = torch.Generator().manual_seed(0)
        video, text = torch.randn(1, 4, 8, 4, 4, generator=generator), torch.randn(1, 16, 32, generator=generator)
        expected = transformer(video, torch.tensor([500.0]), text).sample
        transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
        assert torch.equal(transformer(video, torch.tensor([500.0]), text).sample, expected)
