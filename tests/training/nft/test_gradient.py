import pytest
import torch
from accelerate import Accelerator

from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.rollout.samples import VideoBatch
from astrolabe_diffusers.training.forward_process.noising import noise_batch, squared_distance, training_sigmas
from astrolabe_diffusers.training.forward_process.predictors import BlockwiseModel
from astrolabe_diffusers.training.nft.gradient import accumulate_gradients, optimizer_step
from astrolabe_diffusers.training.nft.loss import nft_loss
from astrolabe_diffusers.training.optimization import CollapseGuard, make_optimizer
from astrolabe_diffusers.training.policies import OLD, policy_parameters, use_policy
from tests.training.helpers import config, make_samples, noised_batch, policy_pipeline, rows


@pytest.fixture
def pipe():
    return policy_pipeline()


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(mixed_precision="no")


def predict_window(transformer, batch):
    return torch.cat(list(BlockwiseModel(transformer, batch).predict_window().values()), dim=2)


def gradients(transformer):
    return [p.grad.clone() for p in policy_parameters(transformer)]


def accumulate(accelerator, transformer, batches, cfg):
    transformer.zero_grad()
    count = sum(len(batch.clean) for batch in batches)
    statistics = [
        accumulate_gradients(accelerator, transformer, batch, cfg, count, i == len(batches) - 1)
        for i, batch in enumerate(batches)
    ]
    return gradients(transformer), sum(statistics) / count


@pytest.mark.parametrize("policy", ["current", "old", "reference"])
def test_blockwise_prediction_is_teacher_forcing(pipe, policy):
    """The model's own forward without a cache gives every noisy block the same clean context in one call."""
    batch = noised_batch(pipe)
    with use_policy(pipe.transformer, policy) as transformer:
        prediction = predict_window(transformer, batch)
        flow = transformer(batch.noisy, batch.timestep, batch.prompt_embeds, clean_hidden_states=batch.clean).sample
    expected = batch.noisy - batch.sigma.view(-1, 1, 1, 1, 1) * flow
    torch.testing.assert_close(prediction, expected, rtol=0, atol=1e-5)


def whole_clip_loss(pipe, batch, cfg):
    """The loss of the whole clip in one graph, in plain code; the sum over blocks of the trainer must equal it."""
    transformer = pipe.transformer
    with use_policy(transformer, "old"):
        old = predict_window(transformer, batch)
    with use_policy(transformer, "reference"):
        reference = predict_window(transformer, batch)
    current = predict_window(transformer, batch)
    losses = nft_loss(current, old, batch.clean, batch.optimality, cfg.beta)
    return (batch.weight * losses + cfg.kl_weight * batch.kl_weight * squared_distance(current, reference)).mean()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_backward_by_blocks_equals_one_backward_over_the_clip(pipe, accelerator, checkpointing):
    batch, cfg = noised_batch(pipe), config(context_policy="own")
    loss = whole_clip_loss(pipe, batch, cfg)
    loss.backward()
    expected = gradients(pipe.transformer)
    assert min(g.abs().max() for g in expected) > 1e-6  # every LoRA weight of every layer learns
    if checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    actual, statistics = accumulate(accelerator, pipe.transformer, [batch], cfg)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(statistics[0], loss.detach(), rtol=1e-5, atol=0)


def test_gradient_by_finite_differences(pipe, accelerator):
    """With one block there is no context, which is held constant, and the loss is a plain function of the LoRA."""
    batch, cfg = noised_batch(pipe, frames=3), config()
    parameters = policy_parameters(pipe.transformer)
    actual, _ = accumulate(accelerator, pipe.transformer, [batch], cfg)
    generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(p.shape, generator=generator) for p in parameters]
    values = []
    with torch.no_grad():
        for step in (1e-3, -2e-3):
            for parameter, direction in zip(parameters, directions):
                parameter.add_(step * direction)
            values.append(whole_clip_loss(pipe, batch, cfg).double())
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
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    accumulate(accelerator, pipe.transformer, [batch], config(kl_weight=0.1))
    with_kl = len(calls)
    accumulate(accelerator, pipe.transformer, [batch], config(kl_weight=0.0))
    # Two blocks: two predictions a policy, and one clean pass.
    assert (with_kl, len(calls) - with_kl) == (7, 5)


def test_statistics(pipe, accelerator):
    batch, cfg = noised_batch(pipe), config(context_policy="own")
    _, statistics = accumulate(accelerator, pipe.transformer, [batch], cfg)
    predictions = {}
    for policy in ("current", "old", "reference"):
        with use_policy(pipe.transformer, policy):
            predictions[policy] = predict_window(pipe.transformer, batch)
    expected = [
        whole_clip_loss(pipe, batch, cfg),
        nft_loss(predictions["current"], predictions["old"], batch.clean, batch.optimality, cfg.beta).mean(),
        (predictions["current"] - predictions["reference"]).square().mean(),
        (predictions["current"] - predictions["old"]).square().mean(),
        predictions["current"].square().mean(),
    ]
    torch.testing.assert_close(statistics, torch.stack(expected).detach(), rtol=1e-4, atol=1e-6)


def make_step(pipe, accelerator, **values):
    cfg = config(learning_rate=1e-2, max_train_steps=10, **values)
    optimizer, schedule = make_optimizer(cfg, policy_parameters(pipe.transformer))
    batches = [noised_batch(pipe, seed=seed) for seed in (0, 1)]
    return cfg, optimizer, schedule, batches


def test_step_moves_the_current_policy_only_and_lowers_the_loss(pipe, accelerator):
    cfg, optimizer, schedule, batches = make_step(pipe, accelerator)
    before = {name: p.clone() for name, p in pipe.transformer.named_parameters()}
    losses = [
        optimizer_step(accelerator, pipe.transformer, optimizer, schedule, batches, cfg, CollapseGuard(0), i)["loss"]
        for i in range(4)
    ]
    moved = {name for name, p in pipe.transformer.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".default." in name}
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.98 * losses[0]


def test_gradient_norm_is_reported_and_clipped(pipe, accelerator):
    cfg, optimizer, schedule, batches = make_step(pipe, accelerator, max_grad_norm=1e-3)
    expected, _ = accumulate(accelerator, pipe.transformer, batches, cfg)
    norm = torch.cat([g.flatten() for g in expected]).norm()
    pipe.transformer.zero_grad()
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.extend(gradients(pipe.transformer)))
    statistics = optimizer_step(accelerator, pipe.transformer, optimizer, schedule, batches, cfg, CollapseGuard(0), 1)
    assert statistics["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    assert torch.cat([g.flatten() for g in seen]).norm() == pytest.approx(1e-3, rel=1e-3)


def test_collapse_stops_before_the_weights_are_touched(pipe, accelerator):
    cfg, optimizer, schedule, batches = make_step(pipe, accelerator)
    batches[0].optimality = torch.full((2,), float("nan"))
    before = [p.clone() for p in policy_parameters(pipe.transformer)]
    with pytest.raises(UserError, match="step 3: the loss is nan.*learning_rate"):
        optimizer_step(accelerator, pipe.transformer, optimizer, schedule, batches, cfg, CollapseGuard(2), 3)
    assert all(map(torch.equal, policy_parameters(pipe.transformer), before))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_step_without_a_finite_loss_or_gradient(pipe, accelerator, where):
    cfg, optimizer, schedule, batches = make_step(pipe, accelerator, lr_scheduler="linear")
    skipping = config(nan_loss="skip")
    parameters = policy_parameters(pipe.transformer)
    step = [accelerator, pipe.transformer, optimizer, schedule]
    good = [noised_batch(pipe, seed=2)]
    if where == "loss":
        batches[0].optimality = torch.full((2,), float("nan"))
    else:
        handle = parameters[0].register_hook(lambda gradient: gradient * float("inf"))
    before, guard = [p.clone() for p in parameters], CollapseGuard(2)
    with pytest.raises(UserError, match="step 1: the loss is .*gradient's norm (nan|inf)"):
        optimizer_step(*step, batches, cfg, guard, 1)
    optimizer.zero_grad()
    statistics = optimizer_step(*step, batches, skipping, guard, 1)
    assert statistics["skipped_steps"] == 1
    assert all(map(torch.equal, parameters, before)) and not optimizer.state and guard.start_norm is None
    assert schedule.last_epoch == 1  # the schedule counts steps, taken or not
    if where == "gradient":
        handle.remove()
    # Nothing of it is left for the next step.
    expected, _ = accumulate(accelerator, policy_pipeline().transformer, good, cfg)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.extend(gradients(pipe.transformer)))
    assert optimizer_step(*step, good, skipping, guard, 2)["skipped_steps"] == 0
    norm = torch.cat([g.flatten() for g in expected]).norm()
    torch.testing.assert_close(seen, [g * min(1.0, cfg.max_grad_norm / norm.item()) for g in expected])


def test_collapse_guard_watches_the_norm_in_both_directions():
    guard = CollapseGuard(factor=2.0)
    for norm in (1.0, 1.9, 0.6):
        guard.check(0.5, norm, 1.0, 1)
    with pytest.raises(UserError, match="2.10 times.*collapse_factor=2"):
        guard.check(0.5, 2.1, 1.0, 2)
    with pytest.raises(UserError, match="0.40 times"):
        guard.check(0.5, 0.4, 1.0, 2)
    CollapseGuard(factor=0, start_norm=1.0).check(0.5, 100.0, 1.0, 1)


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


def test_noise_belongs_to_the_sample():
    sigmas = torch.tensor([1.0, 0.75, 0.5, 0.25])
    samples = make_samples(8)
    latents = torch.randn(8, 4, 6, 4, 4)

    def noise(part):
        batch = VideoBatch(samples[part], torch.zeros(8, 1, 1)[part], latents[part], None)
        advantages, weights = torch.linspace(-6, 6, 8)[part], torch.ones(8)[part]
        return noise_batch(batch, sigmas, advantages, weights, weights, True, 5.0)

    whole, parts = noise(slice(0, 8)), [noise(slice(0, 3)), noise(slice(3, 8))]
    for name in ("clean", "noisy", "sigma", "timestep", "prompt_embeds", "optimality", "weight"):
        value = getattr(whole, name)
        assert torch.equal(value, torch.cat([getattr(part, name) for part in parts])), name
    assert len(set(whole.sigma.tolist())) > 1
    torch.testing.assert_close(whole.timestep, 1000 * whole.sigma)
    assert whole.optimality[0] == 0 and whole.optimality[-1] == 1
    one = whole.sigma == 1
    noise_only = (whole.noisy - (1 - whole.sigma).view(-1, 1, 1, 1, 1) * latents) / whole.sigma.view(-1, 1, 1, 1, 1)
    assert abs(noise_only.std() - 1) < 0.05 and (not one.any() or not torch.equal(whole.noisy[one], latents[one]))


def test_dropout_acts_on_the_current_policy_only():
    pipe = policy_pipeline()
    batch = noised_batch(pipe)
    for module in pipe.transformer.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout = torch.nn.ModuleDict({name: torch.nn.Dropout(0.5) for name in ("default", OLD)})
    pipe.transformer.train()
    with use_policy(pipe.transformer, "old"):
        first, second = (predict_window(pipe.transformer, batch) for _ in range(2))
    assert torch.equal(first, second)
    first, second = (predict_window(pipe.transformer, batch) for _ in range(2))
    assert not torch.equal(first, second)
