"""Every published model's way to generate, as it is written into converted folders, against the slow reference."""

import numpy as np
import pytest
import torch

from astrolabe_diffusers.layouts.published_models import PUBLISHED_MODELS
from astrolabe_diffusers.models.vae_streaming import encode_video
from tests.models.test_rope_window import PublishedRows
from tests.pipelines.test_block_generation import server_context
from tests.reference_causal_wan import ReferenceCausalWan, published_noise
from tests.reference_memory_bank import ReferenceMemoryBank
from tests.tiny_pipeline import SMALL, tiny_pipeline


PROMPT = "a red circle moves up on a white background"
FOUR = [1.0, 0.75, 0.5, 0.25]
FIVE = [*FOUR, 0.0]
# Whose timesteps after the shift are 1000, 938, 833 and 625.
ROUNDED = [sigma / (5 - 4 * sigma) for sigma in (1.0, 0.938, 0.833, 0.625)]

# Blocks, and what baselines.md and more_models.md say: steps of the first and of the other blocks.
RECIPES = {
    "self-forcing": (3, FOUR, FOUR),
    "causal-forcing-chunkwise": (3, FOUR, FOUR),
    "causal-forcing-framewise": (4, FOUR, FOUR),
    "causal-forcing-framewise-2step": (4, FOUR, [1.0, 0.5]),
    "causal-forcing-framewise-1step": (4, FOUR, [1.0]),
    # The window is full after four blocks: two more roll it.
    "longlive": (6, FOUR, FOUR),
    "longlive-infinity": (6, FOUR, FOUR),
    "kvpo-longlive": (6, FOUR, FOUR),
    # Block 3 is the first that sees a sink of two blocks.
    "reward-forcing": (9, FOUR, FOUR),
    # And the bank is full after ten.
    "memflow": (13, FOUR, FOUR),
    "kvpo-memflow": (13, FOUR, FOUR),
    "krea-14b": (4, FIVE, FIVE),
    "raven": (3, ROUNDED, ROUNDED),
    "one-forcing": (4, FOUR, [1.0]),
    "infinity-rope": (4, FOUR, FOUR),
    # Windows of 21 frames, and rows that the window of 12 reaches the end of after seven blocks.
    "rmd": (23, FOUR, FOUR),
    "self-gradient-forcing-framewise": (23, FOUR, FOUR),
    "self-gradient-forcing-chunkwise": (9, FOUR, FOUR),
    "sgf-plus-framewise": (23, FOUR, FOUR),
    "sgf-plus-chunkwise": (6, FOUR, FOUR),
}
# What is right for one of these is right for the others, which is not computed again.
ALIKE = [("self-forcing", "causal-forcing-chunkwise"), ("causal-forcing-framewise-1step", "one-forcing")]
ALIKE += [("longlive", "kvpo-longlive"), ("memflow", "kvpo-memflow")]
# Rows of the table as their authors give them.
ROWS = {"self-gradient-forcing-framewise": 21, "self-gradient-forcing-chunkwise": 21}
VARIANTS = {
    "self-gradient-forcing-chunkwise, 12 rows": ("self-gradient-forcing-chunkwise", {"rope_window": 12}),
    "reward-forcing, stronger": ("reward-forcing", {"sink_ema": 0.7}),
    "krea-14b, plain": ("krea-14b", {"num_context_frames": None, "sigmas": FOUR}),
    "krea-14b, past": ("krea-14b", {"past_weight": 0.3}),
    "longlive, past": ("longlive", {"past_weight": 0.3}),
    "memflow, one prompt": ("memflow", {"memory_bank_update": "single_prompt"}),
    "memflow, no copies": ("memflow", {"memory_bank_update": "once"}),
}


def build(model, **changes):
    published = PUBLISHED_MODELS[model]
    config = {**published.transformer, **published.pipeline, **changes}
    return tiny_pipeline(**{**config, **SMALL, "num_frames": 21})


@torch.no_grad()
def expected(pipe, blocks, first, others, context=None, seed=0, published_config=None, rows=None, **kwargs):
    n = pipe.transformer.config.num_frames_per_block
    steps = [len(others if block else first) for block in range(blocks)]
    noise, renoise = published_noise(torch.Generator().manual_seed(seed), (1, 4, n * blocks, 2, 4), n, steps)
    config, rows = dict(pipe.transformer.config) | (published_config or {}), {"rows": rows} if rows else {}
    reference_class = PublishedRows if rows else ReferenceCausalWan
    if config["memory_bank_size"]:
        reference_class = ReferenceMemoryBank
    reference = reference_class(pipe.transformer.state_dict(), config, **rows)
    reference.past_weight = pipe.config.past_weight
    text = pipe.encode_prompt(PROMPT)
    return reference.sample(noise, renoise, text, others, first_sigmas=first, encode_context=context, **kwargs)


def generate(pipe, seed=0, **kwargs):
    return pipe(PROMPT, generator=torch.Generator().manual_seed(seed), output_type="latent", **kwargs).frames


def test_every_published_model_has_a_recipe():
    assert RECIPES.keys() == PUBLISHED_MODELS.keys()
    for names in ALIKE:
        one, other = (PUBLISHED_MODELS[name] for name in names)
        settings = one.pipeline | {"num_frames": other.pipeline.get("num_frames")}
        assert one.transformer == other.transformer
        assert settings == {"num_frames": None} | other.pipeline
        assert RECIPES[names[0]] == RECIPES[names[1]]


@pytest.mark.parametrize("variant", [*(name for name in RECIPES if name not in dict(ALIKE).values()), *VARIANTS])
def test_equals_the_reference(variant):
    model, changes = VARIANTS.get(variant, (variant, {}))
    pipe = build(model, **changes)
    blocks, first, others = RECIPES[model]
    context = server_context(pipe.vae) if model == "krea-14b" else None
    if variant == "krea-14b, plain":
        first, others, context = FOUR, FOUR, None
    published = {"rows": changes.get("rope_window", ROWS.get(model)), "exact_levels": model == "raven"}
    if model == "rmd":  # which says absolute, and has no sink
        published["published_config"] = {"rope_mode": "absolute"}
    wanted = expected(pipe, blocks, first, others, context, **published)
    result = generate(pipe, num_frames=4 * wanted.shape[2] - 3)
    assert wanted.std() > 0.3
    error = (result - wanted).abs().max().item()
    print(f"{variant}: {error:.1e}")
    assert error <= 1e-5


@pytest.mark.parametrize("model", ["longlive", "krea-14b"])
def test_past_weight_matters(model):
    results = [generate(build(model, past_weight=weight), num_frames=45) for weight in (1.0, 0.3)]
    difference = (results[0] - results[1]).abs().amax(dim=(0, 1, 3, 4))
    assert difference[:3].max() == 0 and difference[3:].min() > 1e-4


@pytest.mark.parametrize("variant", [name for name in RECIPES if name.endswith("step")])
def test_few_steps_after_an_image(variant):
    """The first block that is generated takes the four steps, not the given one before it."""
    pipe, (_, first, others) = build(variant, num_layers=1), RECIPES[variant]
    image = np.random.default_rng(0).random((1, 16, 32, 3)).astype("float32")
    given = encode_video(pipe.vae, torch.from_numpy(image).permute(3, 0, 1, 2)[None] * 2 - 1)
    wanted = expected(pipe, 3, first, others, given=given)
    assert (generate(pipe, image=image, num_frames=13) - wanted).abs().max() <= 1e-5


def test_noise_is_rounded_once_to_the_dtype_of_the_model():
    """As drawn in it on CUDA. Up to full noise again, a step leaves nothing but its own draw."""
    pipe = build("self-forcing").to(torch.bfloat16)
    seen = []
    generate(
        pipe,
        num_frames=9,
        sigmas=[1.0, 1.0 - 1e-9],  # in float32 both are 1
        callback_on_step_end=lambda pipe, step, t, values: seen.append(values["latents"]) or {},
    )
    noise, renoise = published_noise(torch.Generator().manual_seed(0), (1, 4, 3, 2, 4), 3, [2])
    assert torch.equal(seen[0], renoise[0][0].bfloat16().float()) and not torch.equal(seen[0], renoise[0][0])
    drawn = pipe.prepare_latents(1, 16, 32, 9, "cpu", torch.Generator().manual_seed(0))
    assert torch.equal(drawn, noise.bfloat16().float())


@pytest.mark.parametrize(
    "model,strength",
    [("krea-14b", 0.7), ("self-forcing", 0.85), ("krea-14b", 1.0), ("causal-forcing-framewise-2step", 0.7)],
)
@torch.no_grad()
def test_video_to_video(model, strength):
    pipe = build(model, num_layers=1)
    _, *levels = RECIPES[model]
    video = np.random.default_rng(0).random((33, 16, 32, 3)).astype("float32")
    result = generate(pipe, video=video, strength=strength)
    first, others = ([int(round(1000 * strength * s, 6)) / 1000 for s in sigmas] for sigmas in levels)
    context = server_context(pipe.vae) if model == "krea-14b" else None
    original = encode_video(pipe.vae, torch.from_numpy(video).permute(3, 0, 1, 2)[None] * 2 - 1)
    blocks = 9 // pipe.transformer.config.num_frames_per_block
    wanted = expected(pipe, blocks, first, others, context, original=original)
    assert result.shape[2] == 9 and (result - wanted).abs().max() <= 1e-5
    # Latents of the video serve as well; with full noise nothing of it is left.
    assert torch.equal(generate(pipe, video=original, strength=strength), result)
    if strength == 1:
        assert (generate(pipe, num_frames=33) - result).abs().max() < 1e-5


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"strength": 0.5}, "needs a `video`"),
        ({"strength": 1.5, "video": np.zeros((9, 16, 32, 3))}, r"has to be in \(0, 1\]"),
        ({"strength": 0.5, "video": np.zeros((9, 16, 32, 3)), "num_frames": 21}, "keeps its 9 frames"),
        ({"strength": 0.5, "video": np.zeros((10, 16, 32, 3))}, "no whole number of blocks"),
    ],
)
def test_what_a_user_gets_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(build("self-forcing"), **arguments)
