"""CM-GRPO's loss and its parts, against the sampler, against finite differences and against plain code."""

import copy
import functools
import json
from dataclasses import replace
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from astrolabe_diffusers import CausalWanKVCache
from astrolabe_diffusers.cli.train import parse_args
from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.rollout.past import Past
from astrolabe_diffusers.rollout.samples import VideoBatch
from astrolabe_diffusers.rollout.sampling import Sampler, SharedPastSampler
from astrolabe_diffusers.rollout.seeds import seeded_generator
from astrolabe_diffusers.training.cm_grpo import CMGRPOConfig, CMGRPOTrainer
from astrolabe_diffusers.training.cm_grpo.trainer import (
    CMGRPOBatch,
    accumulate_gradients,
    block_weights,
    drawn_step,
    noisy_steps,
    step_noise,
)
from astrolabe_diffusers.training.forward_process.predictors import BlockwisePredictor, TeacherForcingPredictor
from astrolabe_diffusers.training.policies import policy_parameters, use_policy
from tests.own_transformer import OwnTransformer
from tests.tiny_pipeline import tiny_pipeline
from tests.training.helpers import BRIGHTNESS, make_samples, policy_pipeline, tiny_settings


pytestmark = pytest.mark.usefixtures("no_charts")


WINDOW = {"local_attn_size": 9, "sink_size": 3}
MODELS = {
    "unlimited": {},
    "window": {"local_attn_size": 9},
    "sink": WINDOW,
    "relative": {**WINDOW, "rope_mode": "relative"},
    "no whole blocks": {"local_attn_size": 8, "sink_size": 1, "rope_mode": "relative"},
}
PAST_WEIGHT = {"past_weight": 0.5}
PASTS = {"whole": Past(), "window": Past(6), "shared": Past(6, shared=True)}
ADVANTAGES = torch.tensor([1.5, -0.7])
# Of the sampler's levels 1, 0.9375, 0.8333 and 0.625.
SIGMAS, FOLLOWING = torch.tensor([0.9375, 0.8333]), torch.tensor([0.8333, 0.625])

pipeline = functools.cache(policy_pipeline)  # nothing here changes its weights


def config(**values):
    return CMGRPOConfig(**{"rewards": {BRIGHTNESS: 1.0}, "blocks_per_pass": 7, **values})


def random_batch(past=Past(), frames=9, dtype=torch.float32):
    """Two videos of any latents, as if the sampler had gone from the noisy ones to others."""
    generator = torch.Generator().manual_seed(0)
    clean, noisy, following = torch.randn(3, 2, 4, past.num_frames + frames, 4, 4, generator=generator, dtype=dtype)
    embeds = torch.randn(2, 16, 32, generator=generator, dtype=dtype)
    if past.shared:
        clean[1:, :, : past.num_frames], embeds[1] = clean[:1, :, : past.num_frames], embeds[0]
    window = slice(past.num_frames, None)
    sigma, following_sigma = SIGMAS.to(dtype), FOLLOWING.to(dtype)
    return CMGRPOBatch(
        clean,
        noisy[:, :, window],
        sigma,
        1000 * sigma,
        embeds,
        past,
        pipeline=pipeline(),
        following=following[:, :, window],
        following_sigma=following_sigma,
        advantages=ADVANTAGES.to(dtype),
    )


def gradient(transformer, batch, cfg):
    transformer.zero_grad()
    sums = accumulate_gradients(Accelerator(mixed_precision="no"), transformer, batch, cfg, 2, True)
    return [p.grad.clone() for p in policy_parameters(transformer)], sums


# The transitions


def drawn_noise(sample, frames, past, step):
    """The noise `(C, frames - past, h, w)` of a step of all blocks, by the sample's generator: it draws what the video
    begins with, and then three times for each block."""
    generator = seeded_generator("sample", *sample.key)

    def draw(number):
        return torch.randn(1, number, 4, 4, 4, generator=generator)[0].transpose(0, 1)

    own = frames - past.num_frames * past.shared
    draw(own)
    blocks = [[draw(3) for _ in range(3)][step] for _ in range(own // 3)]
    return torch.cat(blocks, dim=1)[:, past.num_frames * (not past.shared) :]


@pytest.mark.parametrize("past", PASTS)
@pytest.mark.parametrize("model", [*MODELS, "past weight", "past weight, sink"])
def test_the_noise_of_a_step_is_what_the_sampler_drew(model, past):
    """The predictors find again what the sampler predicted: as its policy, the noise between that and its next state
    is what its generators draw. Not with gradients through a context that has a weight."""
    settings = {**MODELS, "past weight": PAST_WEIGHT, "past weight, sink": {**WINDOW, **PAST_WEIGHT}}
    pipe, past = pipeline(**settings[model]), PASTS[past]
    size = {"height": 32, "width": 32, "num_frames": 57}  # 15 latent frames
    sampler, samples = Sampler(pipe, size, keep_trajectory=True), make_samples(2)
    if past.shared:
        sampler = SharedPastSampler(pipe, size, keep_trajectory=True, num_past_frames=past.num_frames)
    embeds = torch.randn(1, 16, 32).expand(2, -1, -1).contiguous()
    with use_policy(pipe.transformer, "current"):
        latents, trajectory = sampler(embeds, samples)
    videos = VideoBatch(samples, embeds, latents, None, past, trajectory, pipeline=pipe)
    predictors = [BlockwisePredictor, TeacherForcingPredictor][: 2 - (pipe.config.past_weight != 1)]
    for step, predictor_class in product((0, 1, 2), predictors):
        batch = drawn_step(videos, [step], 3, ADVANTAGES)
        predictor = predictor_class(pipe.transformer, batch, "current", 2)
        clean = torch.cat(list(predictor.predict_window().values()), dim=2)
        expected = torch.stack([drawn_noise(sample, 15, past, step) for sample in samples])
        assert (step_noise(clean, batch.following, batch.following_sigma) - expected).abs().max() < 1e-4


def test_each_sample_draws_a_step_for_all_its_blocks():
    """By its own generator, whatever the batch it is in."""
    pipe, samples = pipeline(), make_samples(12, group_size=4)
    embeds = torch.randn(12, 16, 32)
    with use_policy(pipe.transformer, "current"):
        latents, trajectory = Sampler(pipe, {"height": 32, "width": 32, "num_frames": 21}, True)(embeds, samples)
    batch = drawn_step(VideoBatch(samples, embeds, latents, None, Past(), trajectory), [0, 2], 3, torch.zeros(12))
    steps = [trajectory.timesteps[0].index(timestep) for timestep in batch.timestep]
    assert set(steps) == {0, 2}
    for row, step in enumerate(steps):
        for block in range(2):
            frames = slice(3 * block, 3 * block + 3)
            assert torch.equal(batch.noisy[row, :, frames], trajectory.latents[block][step][row])
            assert torch.equal(batch.following[row, :, frames], trajectory.latents[block][step + 1][row])
        assert batch.following_sigma[row] == trajectory.timesteps[0][step + 1] / 1000
    with use_policy(pipe.transformer, "current"):
        one, its = Sampler(pipe, {"height": 32, "width": 32, "num_frames": 21}, True)(embeds[5:6], samples[5:6])
    alone = drawn_step(VideoBatch(samples[5:6], embeds[5:6], one, None, Past(), its), [0, 2], 3, torch.zeros(1))
    assert alone.timestep == batch.timestep[5]


# The gradient


@pytest.fixture
def double(monkeypatch):
    """Where the model, as diffusers' own does, computes in float32 whatever its weights are, it takes float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def log_density(transformer, constant, batch, cfg):
    """Log-density of the transitions, its mean over elements and samples, weighted by advantages and blocks: in plain
    code, block after block through a cache as the sampler goes. `constant` is the model whose K/V are constants."""
    past, n = batch.past.num_frames, 3
    cache = CausalWanKVCache(transformer.config.num_layers, max_frames=batch.clean.shape[2])
    num_blocks, total = (batch.clean.shape[2] - past) // n, 0.0

    def run(model, latents, timestep, mode, start):
        arguments = {"kv_cache": cache, "kv_cache_mode": mode, "frame_offset": start, "return_dict": False}
        return model(latents, timestep, batch.prompt_embeds, **arguments)[0]

    weights = [Fraction(1, num_blocks - c) if cfg.block_weighting == "late" else 1 for c in range(num_blocks)]
    for start in range(0, batch.clean.shape[2], n):
        if start >= past:
            frames, block = slice(start - past, start - past + n), (start - past) // n
            flow = run(transformer, batch.noisy[:, :, frames], batch.timestep, "read", start)
            weight = float(weights[block] / sum(weights))
            for row in range(2):
                clean = batch.noisy[row, :, frames] - batch.sigma[row] * flow[row]
                sigma = batch.following_sigma[row]
                policy = torch.distributions.Normal((1 - sigma) * clean, sigma)
                total += weight * batch.advantages[row] * policy.log_prob(batch.following[row, :, frames]).mean() / 2
        keeps = transformer if start >= past and cfg.context == "clean_grad" else constant
        run(keeps, batch.clean[:, :, start : start + n], torch.zeros_like(batch.timestep), "write", start)
    return total


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("past", PASTS)
@pytest.mark.parametrize(
    ("model", "values"),
    [
        ("unlimited", {}),
        ("unlimited", {"block_weighting": "uniform"}),
        ("unlimited", {"context": "clean", "blocks_per_pass": 2}),
        ("sink", {}),
        ("relative", {}),
        ("relative", {"context": "clean"}),
    ],
)
def test_gradient_by_finite_differences_of_the_log_density(model, values, past):
    pipe, cfg, batch = policy_pipeline(**MODELS[model]), config(**values), random_batch(PASTS[past], 9, torch.double)
    transformer = pipe.transformer.double()
    parameters = policy_parameters(transformer)
    constant = copy.deepcopy(transformer)
    actual, _ = gradient(transformer, batch, cfg)
    generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(p.shape, generator=generator, dtype=torch.double) for p in parameters]
    slope = sum((g * d).sum() for g, d in zip(actual, directions))
    values = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for parameter, direction in zip(parameters, directions):
                parameter.add_(step * direction)
            values.append(log_density(transformer, constant, batch, cfg))
    assert abs(slope) > 1e-3
    torch.testing.assert_close(-slope, (values[0] - values[1]) / 2e-6, rtol=1e-5, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_gradient_is_that_of_a_teacher_forcing_pass(model, checkpointing):
    """The whole video in one graph, through its clean half too, and the KL of the means, in plain code."""
    pipe, cfg, batch = policy_pipeline(**MODELS[model]), config(kl_weight=0.3), random_batch(frames=15)
    transformer = pipe.transformer
    sigma, s = (x.view(-1, 1, 1, 1, 1) for x in (batch.sigma, batch.following_sigma))

    def mean():
        flow = transformer(batch.noisy, batch.timestep, batch.prompt_embeds, clean_hidden_states=batch.clean).sample
        return (1 - s) * (batch.noisy - sigma * flow)

    with use_policy(transformer, "base"):
        base = mean()
    current = mean()
    weight = torch.tensor([1 / 5, 1 / 4, 1 / 3, 1 / 2, 1]).repeat_interleave(3).view(1, 1, -1, 1, 1)
    squares = ((batch.following - current) / s).square() * weight / weight.mean()
    policy_loss = (batch.advantages * squares.flatten(1).mean(1) / 2).mean()
    kl = (current - base).square().mean()
    (policy_loss + 0.3 * kl).backward()
    expected = [p.grad.clone() for p in policy_parameters(transformer)]
    assert min(e.abs().max() for e in expected) > 1e-5
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    actual, sums = gradient(transformer, batch, cfg)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sums["policy_loss"] / 2, policy_loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sums["kl"] / 2, kl.detach(), rtol=1e-5, atol=1e-6)


def test_gradient_through_the_context_is_another():
    """And that of the first block, which has none, is not."""
    pipe, batch = pipeline(), random_batch()
    through, _ = gradient(pipe.transformer, batch, config())
    constant, _ = gradient(pipe.transformer, batch, config(context="clean"))
    assert max((a - b).abs().max() for a, b in zip(through, constant)) > 1e-3
    first = random_batch(frames=3)
    through, _ = gradient(pipe.transformer, first, config())
    constant, _ = gradient(pipe.transformer, first, config(context="clean"))
    torch.testing.assert_close(through, constant, rtol=1e-4, atol=1e-7)


def test_a_transformer_of_one_s_own():
    pipe = policy_pipeline(transformer=OwnTransformer())
    actual, _ = gradient(pipe.transformer, random_batch(), config(context="clean"))
    assert min(g.abs().max() for g in actual) > 0


def test_gradient_with_respect_to_the_prediction_is_the_published_one():
    """`-A (1 - s) (x_s - mu) / s^2`, and of the released form of the loss, `100 mean |x_0 - sg(x_0 - g)|^2` with half
    that as `g`, a hundred times the gradient of ours."""
    clean, following = torch.randn(2, 2, 4, 3, 2, 2, dtype=torch.double)
    clean.requires_grad_()
    advantages, s = ADVANTAGES.double(), FOLLOWING.double()
    noise = step_noise(clean, following, s)
    loss = (advantages * noise.square().flatten(1).mean(1) / 2).sum()
    (actual,) = torch.autograd.grad(loss, clean)
    a, s = (x.view(-1, 1, 1, 1, 1) for x in (advantages, s))
    given = -a * (1 - s) * (following - (1 - s) * clean) / s**2
    torch.testing.assert_close(actual * clean[0].numel(), given.detach())
    target = (clean - given / 2).detach()
    (released,) = torch.autograd.grad(100 * (clean - target).square().mean(), clean)
    torch.testing.assert_close(released, 100 * actual / 2)  # a mean over two samples


@pytest.mark.parametrize("number", [1, 2, 7])
def test_block_weights(number):
    exact = [Fraction(1, number - c) for c in range(number)]
    expected = [float(weight * number / sum(exact)) for weight in exact]
    assert block_weights(number, "late") == pytest.approx(expected) and np.mean(expected) == pytest.approx(1)
    assert expected == sorted(expected)
    assert block_weights(number, "uniform") == [1.0] * number


# Advantages


def test_advantages_are_the_published_ones(model_folder, tmp_path):
    """Rewards normalised by fours, their weighted sum by prompt: in numpy, with the published guards against a spread
    of zero, which ours are but for 1e-4."""
    rewards = {BRIGHTNESS: 2.0, "tests.training.rewards:contrast": -0.5}
    settings = {"rewards": rewards, "eval_rewards": [], "train_batch_size": 8, "batches_per_epoch": 2}
    settings |= {"samples_per_prompt": 8, "reward_normalization_size": 4}
    trainer = CMGRPOTrainer(config=CMGRPOConfig(**tiny_settings(model_folder, tmp_path, **settings)))
    samples, generator = make_samples(16, group_size=8), np.random.default_rng(0)
    values = [scale * generator.normal(size=16) for scale in (1, 300)]

    def normalised(x, size):
        x = x.reshape(-1, size)
        std = np.maximum(x.std(1, keepdims=True), 1e-4) + 1e-5
        return ((x - x.mean(1, keepdims=True)) / std).ravel()

    total = sum(w * normalised(x, 4) for w, x in zip(rewards.values(), values)) / 2.5
    scores = {name: torch.tensor(x, dtype=torch.float32) for name, x in zip(rewards, values)}
    actual = trainer.advantages(scores, samples).values.numpy()
    trainer.end()
    np.testing.assert_allclose(actual, normalised(total, 8), rtol=1e-3, atol=1e-4)
    by_eights = sum(w * normalised(x, 8) for w, x in zip(rewards.values(), values))
    assert np.abs(actual - normalised(by_eights, 8)).max() > 0.1


# Runs


def test_a_run(model_folder, tmp_path):
    """From the command line's settings to the adapter, evaluated as its average."""
    settings = tiny_settings(model_folder, tmp_path, ema_decay=0.9, lr_warmup_steps=1, gradient_checkpointing="full")
    trainer = CMGRPOTrainer(config=CMGRPOConfig(**settings))
    assert list(trainer.transformer.peft_config) == ["default", "ema"] and trainer.steps == [0, 1, 2]
    results = trainer.train()
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert results["steps"] == 2 and all(record["grad_norm"] > 0 for record in metrics)
    # What trains is what sampled: as much noise as was drawn.
    assert all(record["step_noise"] == pytest.approx(1, abs=0.15) for record in metrics)
    assert "CM-GRPO" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_step_raises_the_expected_reward(sign, model_folder, tmp_path):
    """From 128 videos to the mean reward of 128 others, before and after, with the same noise."""
    settings = {"num_frames": 9, "train_batch_size": 64, "batches_per_epoch": 2, "samples_per_prompt": 32}
    settings |= {"rewards": {BRIGHTNESS: float(sign)}, "num_eval_prompts": 4, "eval_seeds": 32, "max_train_steps": 1}
    trainer = CMGRPOTrainer(config=CMGRPOConfig(**tiny_settings(model_folder, tmp_path, **settings, eval_steps=1)))
    trainer.train()
    before, after = (json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines())
    change = np.subtract(after["scores"][BRIGHTNESS], before["scores"][BRIGHTNESS])
    assert len(change) == 128 and sign * change.mean() > 4 * change.std() / 128**0.5


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"batches_per_epoch": 2, "gradient_accumulation_steps": 1}, "one optimizer step an epoch, not 2"),
        ({"samples_per_prompt": 24, "reward_normalization_size": 5}, "it can be 2, 3, 4, 6, 8, 12 or 24"),
    ],
)
def test_mistakes_in_settings(values, words):
    with pytest.raises(UserError, match=words):
        config(**values)


@pytest.mark.parametrize(
    ("model", "train_steps", "words"),
    [
        ({}, [1, 3], "train_steps=3: the sampler's steps that draw noise are 0 to 2"),
        ({"sigmas": [1.0]}, [], "of a single step has none"),
        # From the third step to the fourth, at 0, there is no noise.
        ({"sigmas": [1.0, 0.5, 0.25, 0.0]}, [2], "train_steps=2: the sampler's steps that draw noise are 0 to 1"),
        ({"sigmas": [1.0, 0.5], "first_block_sigmas": [1.0, 0.75, 0.5]}, [], "are others: set sigmas"),
    ],
)
def test_samplers_that_cannot_be_trained(model, train_steps, words):
    with pytest.raises(UserError, match=words):
        noisy_steps(tiny_pipeline(**model), train_steps)


def test_windows_that_have_no_context_gradient(model_folder, tmp_path, monkeypatch):
    window = CMGRPOConfig(**tiny_settings(model_folder, tmp_path), window_size=3, sample_frames=6)
    with pytest.raises(UserError, match="compile needs context=clean and blocks_per_pass=1"):
        CMGRPOTrainer(config=replace(window, compile=True))
    monkeypatch.setattr("astrolabe_diffusers.models.transformer_causal_wan.CausalWanTransformer3DModel.packs_clips", 0)
    with pytest.raises(UserError, match="no `packs_clips`.: set context=clean"):
        CMGRPOTrainer(config=window)


def test_the_recipe_of_raven():
    """The numbers of the published run, by hand."""
    config = parse_args(["--config", "raven_cm_grpo"])
    assert type(config) is CMGRPOConfig and config.groups_per_epoch(8) == 8 and config.max_train_steps == 160
    adam = config.learning_rate, config.adam_beta1, config.adam_beta2, config.adam_epsilon, config.adam_weight_decay
    assert adam == (5e-6, 0.0, 0.999, 1e-10, 0.0) and (config.ema_decay, config.max_grad_norm) == (0.9675, 1000.0)
    assert config.train_batch_size * config.batches_per_epoch == config.reward_normalization_size == 4
    assert list(config.rewards.values()) == [0.35, 2.0, 1.0, 1.0, 0.75] and config.kl_weight == 0
    assert config.samples_per_prompt == 4 and replace(config, samples_per_prompt=32).groups_per_epoch(8) == 1
