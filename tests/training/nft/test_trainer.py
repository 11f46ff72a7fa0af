import json
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.rollout.samples import VideoBatch
from astrolabe_diffusers.training.forward_process.noising import noise_batch, squared_distance, training_sigmas
from astrolabe_diffusers.training.forward_process.predictors import BlockwisePredictor
from astrolabe_diffusers.training.nft.loss import nft_loss
from astrolabe_diffusers.training.nft.trainer import accumulate_gradients
from astrolabe_diffusers.training.optimization import CollapseGuard, Optimization, make_optimizer
from astrolabe_diffusers.training.policies import OLD, follow_current, policy_parameters, use_policy
from tests.tiny_pipeline import tiny_pipeline
from tests.training.helpers import config, make_samples, noised_batch, policy_pipeline, rows


@pytest.fixture(scope="module")
def deep():
    """Two layers, for the equations of the gradient."""
    return policy_pipeline(vae_num_res_blocks=0)


@pytest.fixture(scope="module")
def pipe():
    return policy_pipeline(num_layers=1, vae_num_res_blocks=0)


@pytest.fixture
def trained(pipe):
    """For tests that take steps."""
    weights = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    pipe.transformer.zero_grad()
    yield pipe
    pipe.transformer.load_state_dict(weights)


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(mixed_precision="no")


def predict_window(transformer, batch, policy, blocks_per_pass=1):
    """Of the current policy with its graph."""
    predictor = BlockwisePredictor(transformer, batch, policy, blocks_per_pass)
    if policy != "current":
        return torch.cat(list(predictor.predict_window().values()), dim=2)
    parts = []
    for frames in predictor.passes:
        parts.append(predictor.predict(frames))
        predictor.advance(frames)
    return torch.cat(parts, dim=2)


def gradients(transformer):
    return [p.grad.clone() for p in policy_parameters(transformer)]


def accumulate(accelerator, transformer, batches, cfg):
    transformer.zero_grad()
    count = sum(len(batch.clean) for batch in batches)
    statistics = [
        accumulate_gradients(accelerator, transformer, batch, cfg, count, i == len(batches) - 1)
        for i, batch in enumerate(batches)
    ]
    return gradients(transformer), {n: sum(s[n] for s in statistics) / count for n in statistics[0]}


@pytest.mark.parametrize("blocks_per_pass", [1, 2, 7])
@pytest.mark.parametrize("policy", ["current", "old", "reference"])
def test_blockwise_prediction_is_teacher_forcing(deep, policy, blocks_per_pass):
    """The model's own forward without a cache gives every noisy block the same clean context in one call."""
    batch = noised_batch(deep, frames=15)
    prediction = predict_window(deep.transformer, batch, policy, blocks_per_pass)
    with use_policy(deep.transformer, policy) as transformer:
        flow = transformer(batch.noisy, batch.timestep, batch.prompt_embeds, clean_hidden_states=batch.clean).sample
    expected = batch.noisy - batch.sigma.view(-1, 1, 1, 1, 1) * flow
    torch.testing.assert_close(prediction, expected, rtol=0, atol=1e-5)


def whole_clip_loss(pipe, batch, cfg):
    """The loss of the whole clip in one graph, in plain code; the sum over blocks of the trainer must equal it."""
    transformer = pipe.transformer
    old, reference, current = (predict_window(transformer, batch, name) for name in ("old", "reference", "current"))
    losses = nft_loss(current, old, batch.clean, batch.optimality, cfg.beta)
    return (batch.weight * losses + cfg.kl_weight * batch.kl_weight * squared_distance(current, reference)).mean()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_backward_by_blocks_equals_one_backward_over_the_clip(deep, accelerator, checkpointing):
    batch, cfg = noised_batch(deep), config(context_policy="own")
    loss = whole_clip_loss(deep, batch, cfg)
    deep.transformer.zero_grad()
    loss.backward()
    expected = gradients(deep.transformer)
    assert min(g.abs().max() for g in expected) > 1e-6  # every LoRA weight of every layer learns
    if checkpointing:
        deep.transformer.enable_gradient_checkpointing()
    actual, statistics = accumulate(accelerator, deep.transformer, [batch], cfg)
    deep.transformer.disable_gradient_checkpointing()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(statistics["loss"], loss.detach(), rtol=1e-5, atol=0)


def test_gradient_by_finite_differences(deep, accelerator):
    """With one block there is no context, which is held constant, and the loss is a plain function of the LoRA."""
    batch, cfg = noised_batch(deep, frames=3), config()
    parameters = policy_parameters(deep.transformer)
    actual, _ = accumulate(accelerator, deep.transformer, [batch], cfg)
    generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(p.shape, generator=generator) for p in parameters]
    values = []
    with torch.no_grad():
        for step in (1e-3, -2e-3):
            for parameter, direction in zip(parameters, directions):
                parameter.add_(step * direction)
            values.append(whole_clip_loss(deep, batch, cfg).double())
        for parameter, direction in zip(parameters, directions):
            parameter.add_(1e-3 * direction)  # back to where it was
    slope = sum((g * d).sum() for g, d in zip(actual, directions))
    torch.testing.assert_close(slope.double(), (values[0] - values[1]) / 2e-3, rtol=2e-2, atol=0)


def test_accumulated_batches_equal_one_batch(pipe, accelerator):
    whole, cfg = noised_batch(pipe, batch_size=4), config()
    halves = [rows(whole, part) for part in (slice(0, 2), slice(2, 4))]
    expected, statistics = accumulate(accelerator, pipe.transformer, [whole], cfg)
    actual, half_statistics = accumulate(accelerator, pipe.transformer, halves, cfg)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(half_statistics, statistics, rtol=1e-5, atol=1e-6)


def test_skipped_sample_has_no_gradient(pipe, accelerator):
    batch, cfg = noised_batch(pipe), config()
    batch.weight = batch.kl_weight = torch.tensor([1.0, 0.0])
    actual, _ = accumulate(accelerator, pipe.transformer, [batch], cfg)
    single = rows(batch, slice(1))
    expected, _ = accumulate(accelerator, pipe.transformer, [single], cfg)
    torch.testing.assert_close(actual, [g / 2 for g in expected], rtol=1e-4, atol=1e-7)


def test_reference_pass_is_skipped_without_kl(pipe, accelerator):
    batch, calls = noised_batch(pipe), []
    hook = pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    counts = []
    for cfg in [config(kl_weight=kl, blocks_per_pass=number) for number in (1, 2) for kl in (0.1, 0.0)]:
        accumulate(accelerator, pipe.transformer, [batch], cfg)
        counts.append(len(calls))
        calls.clear()
    hook.remove()
    # Two blocks: one clean pass, and two predictions a policy, or one.
    assert counts == [7, 5, 4, 3]


def test_old_policy_has_no_pass_of_its_own_where_it_is_the_current_one(trained, accelerator):
    follow_current(trained.transformer, OLD, decay=0.0)
    batch, calls = noised_batch(trained), []
    hook = trained.transformer.register_forward_hook(lambda *_: calls.append(1))
    expected = accumulate(accelerator, trained.transformer, [batch], config())
    both = len(calls)
    actual = accumulate(accelerator, trained.transformer, [replace(batch, old_is_current=True)], config())
    hook.remove()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert (both, len(calls) - both) == (4, 3)


def test_statistics(pipe, accelerator):
    batch, cfg = noised_batch(pipe), config(context_policy="own")
    _, statistics = accumulate(accelerator, pipe.transformer, [batch], cfg)
    current, old, reference = (
        predict_window(pipe.transformer, batch, policy).detach() for policy in ("current", "old", "reference")
    )
    expected = {
        "loss": whole_clip_loss(pipe, batch, cfg).detach(),
        "policy_loss": nft_loss(current, old, batch.clean, batch.optimality, cfg.beta).mean(),
        "kl": (current - reference).square().mean(),
        "deviation": (current - old).square().mean(),
        "x0_norm": current.square().mean(),
    }
    torch.testing.assert_close(statistics, expected, rtol=1e-4, atol=1e-6)


def make_step(pipe, accelerator, **values):
    cfg = config(learning_rate=1e-2, max_train_steps=10, **values)
    optimizer, schedule = make_optimizer(cfg, policy_parameters(pipe.transformer))
    skip = cfg.nan_loss == "skip"
    optimization = Optimization(accelerator, pipe.transformer, optimizer, schedule, cfg.max_grad_norm, skip)

    def accumulate_batch(videos, batch, *part):
        return accumulate_gradients(accelerator, pipe.transformer, batch, cfg, *part)

    def step(batches, guard, number):
        parts = [(VideoBatch(make_samples(2), None, None, None), batch) for batch in batches]
        return optimization.step(parts, accumulate_batch, guard, number)

    batches = [noised_batch(pipe, seed=seed) for seed in (0, 1)]
    return cfg, optimization, step, batches


def test_step_moves_the_current_policy_only_and_lowers_the_loss(trained, accelerator):
    _, _, step, batches = make_step(trained, accelerator)
    before = {name: p.clone() for name, p in trained.transformer.named_parameters()}
    losses = [step(batches, CollapseGuard(0), i)["loss"] for i in range(4)]
    moved = {name for name, p in trained.transformer.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".default." in name}
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.98 * losses[0]


def test_gradient_norm_is_reported_and_clipped(trained, accelerator):
    cfg, optimization, step, batches = make_step(trained, accelerator, max_grad_norm=1e-3)
    expected, _ = accumulate(accelerator, trained.transformer, batches, cfg)
    norm = torch.cat([g.flatten() for g in expected]).norm()
    trained.transformer.zero_grad()
    seen = []
    optimization.optimizer.register_step_pre_hook(lambda *_: seen.extend(gradients(trained.transformer)))
    statistics = step(batches, CollapseGuard(0), 1)
    assert statistics["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    assert torch.cat([g.flatten() for g in seen]).norm() == pytest.approx(1e-3, rel=1e-3)


def test_collapse_stops_before_the_weights_are_touched(trained, accelerator):
    _, _, step, batches = make_step(trained, accelerator)
    batches[0].optimality = torch.full((2,), float("nan"))
    before = [p.clone() for p in policy_parameters(trained.transformer)]
    with pytest.raises(UserError, match="step 3: the loss is nan.*learning_rate"):
        step(batches, CollapseGuard(2), 3)
    assert all(map(torch.equal, policy_parameters(trained.transformer), before))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_step_without_a_finite_loss_or_gradient(trained, accelerator, where):
    cfg, optimization, step, batches = make_step(trained, accelerator, lr_scheduler="linear")
    optimizer, schedule = optimization.optimizer, optimization.lr_scheduler
    parameters = policy_parameters(trained.transformer)
    good = [noised_batch(trained, seed=2)]
    expected, _ = accumulate(accelerator, trained.transformer, good, cfg)
    trained.transformer.zero_grad()
    if where == "loss":
        batches[0].optimality = torch.full((2,), float("nan"))
    else:
        handle = parameters[0].register_hook(lambda gradient: gradient * float("inf"))
    before, guard = [p.clone() for p in parameters], CollapseGuard(2)
    with pytest.raises(UserError, match="step 1: the loss is .*gradient's norm (nan|inf)"):
        step(batches, guard, 1)
    optimizer.zero_grad()
    optimization.skip_bad = True
    statistics = step(batches, guard, 1)
    assert statistics["skipped_steps"] == 1
    assert all(map(torch.equal, parameters, before)) and not optimizer.state and not guard.first
    assert schedule.last_epoch == 1  # the schedule counts steps, taken or not
    if where == "gradient":
        handle.remove()
    # Nothing of it is left for the next step.
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.extend(gradients(trained.transformer)))
    assert step(good, guard, 2)["skipped_steps"] == 0
    norm = torch.cat([g.flatten() for g in expected]).norm()
    torch.testing.assert_close(seen, [g * min(1.0, cfg.max_grad_norm / norm.item()) for g in expected])


def guarded(norms, factor=2.0) -> CollapseGuard:
    guard = CollapseGuard(factor)
    for step, norm in enumerate(norms, 1):
        guard.check({"loss": 0.5, "grad_norm": 1.0, "x0_norm": norm}, step)
    return guard


def test_collapse_guard_watches_the_norm_in_both_directions():
    values = {"loss": 0.5, "grad_norm": 1.0}
    # A step that is off by more than the square.
    for norm, ratio in ((4.1, "4.10"), (0.24, "0.24")):
        guard = guarded([1.0])
        with pytest.raises(UserError, match=f"step 2: predicted videos have {ratio} times.*collapse_factor=2"):
            guard.check(values | {"x0_norm": norm}, 2)
        guard.check(values | {"x0_norm": 1.0}, 2)  # it has left nothing behind
    # Eight of them that are by less: 5 of 2.7 and 3 of 1 make 2.06, 6 of .3 and 2 of 1 make .475.
    with pytest.raises(UserError, match="step 13: predicted videos have of late 2.06 times"):
        guarded([1.0] * 8 + [2.7] * 8)
    with pytest.raises(UserError, match="step 14: predicted videos have of late 0.47 times"):
        guarded([1.0] * 8 + [0.3] * 8)
    guarded([1.0, 100.0 * 1e3], factor=0)
    guard = guarded([1.0])
    guard.check(values, 3)  # of an algorithm that predicts no videos
    with pytest.raises(UserError, match="step 3: the loss is nan"):
        guard.check(values | {"loss": float("nan")}, 3)


def test_collapse_guard_lets_prompts_differ_and_goes_on_from_a_checkpoint():
    # Norms of a healthy run of two prompts a step, the first of which are dark.
    norms = [0.55, 0.83, 0.70, 0.68, 0.88, 0.72, 0.58, 0.88, 1.17, 1.25, 1.30, 0.98, 1.07, 0.85, 1.19, 1.12]
    guard = guarded(norms)
    resumed = CollapseGuard(2.0)
    resumed.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    for again in (guard, resumed):
        with pytest.raises(UserError, match="step 18: predicted videos have of late 2.0[0-9] times"):
            for step in (17, 18):
                again.check({"loss": 0.5, "grad_norm": 1.0, "x0_norm": 2.8}, step)
    resumed.load_state_dict({"start_norm": 1.0})  # as checkpoints were once
    resumed.check({"loss": 0.5, "grad_norm": 1.0, "x0_norm": 2.8}, 1)


def test_training_sigmas_are_the_samplers(pipe):
    steps = []
    pipe(
        prompt="a red circle",
        height=32,
        width=32,
        num_frames=9,
        output_type="latent",
        callback_on_step_end=lambda pipe, i, t, kwargs: steps.append(t.item()) or {},
    )
    torch.testing.assert_close(1000 * training_sigmas(pipe, "warped"), torch.tensor(steps))
    assert steps == pytest.approx([1000, 937.5, 833.333, 625])
    assert training_sigmas(pipe, "raw").tolist() == [1.0, 0.75, 0.5, 0.25]
    assert training_sigmas(pipe, "warped", [3, 1]).tolist() == pytest.approx([0.625, 0.9375])
    for step in (-1, 4):
        with pytest.raises(UserError, match=f"train_steps={step}: the sampler's steps with noise are 0 to 3"):
            training_sigmas(pipe, "warped", [2, step])


def test_a_step_without_noise_is_not_trained():
    """Krea's server ends with one, of which the sampler makes the smallest level that there is."""
    pipe = tiny_pipeline(sigmas=[1.0, 0.5, 0.0])
    assert (training_sigmas(pipe, "warped") > 0.5).all() and training_sigmas(pipe, "raw").tolist() == [1.0, 0.5]
    with pytest.raises(UserError, match="train_steps=2: the sampler's steps with noise are 0 to 1"):
        training_sigmas(pipe, "raw", [2])


def test_noise_belongs_to_the_sample():
    sigmas = torch.tensor([1.0, 0.75, 0.5, 0.25])
    samples = make_samples(8)
    latents = torch.randn(8, 4, 6, 4, 4)

    def noise(part):
        batch = VideoBatch(samples[part], torch.zeros(8, 1, 1)[part], latents[part], None)
        return noise_batch(batch, sigmas)

    whole, parts = noise(slice(0, 8)), [noise(slice(0, 3)), noise(slice(3, 8))]
    for name in ("clean", "noisy", "sigma", "timestep", "prompt_embeds"):
        value = getattr(whole, name)
        assert torch.equal(value, torch.cat([getattr(part, name) for part in parts])), name
    assert len(set(whole.sigma.tolist())) > 1
    torch.testing.assert_close(whole.timestep, 1000 * whole.sigma)
    one = whole.sigma == 1
    noise_only = (whole.noisy - (1 - whole.sigma).view(-1, 1, 1, 1, 1) * latents) / whole.sigma.view(-1, 1, 1, 1, 1)
    assert abs(noise_only.std() - 1) < 0.05 and (not one.any() or not torch.equal(whole.noisy[one], latents[one]))


@pytest.mark.parametrize("blocks_per_pass", [1, 2])
def test_dropout_acts_on_the_current_policy_only(blocks_per_pass):
    pipe = policy_pipeline(num_layers=1, vae_num_res_blocks=0)
    batch = noised_batch(pipe)
    for module in pipe.transformer.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout = torch.nn.ModuleDict({name: torch.nn.Dropout(0.5) for name in ("default", OLD)})
    pipe.transformer.train()
    first, second = (predict_window(pipe.transformer, batch, "old", blocks_per_pass) for _ in range(2))
    assert torch.equal(first, second)
    first, second = (predict_window(pipe.transformer, batch, "current", blocks_per_pass) for _ in range(2))
    assert not torch.equal(first, second)
