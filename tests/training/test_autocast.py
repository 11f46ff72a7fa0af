"""Runs in bf16: autocast casts each LoRA weight once a step, and all numbers are those of a cast for every use."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from astrolabe_diffusers.models.lora_layers import tuner_layers
from astrolabe_diffusers.rollout.samples import VideoBatch
from astrolabe_diffusers.training.awm import AWMConfig, AWMTrainer
from astrolabe_diffusers.training.checkpointing import CHECKPOINTING
from astrolabe_diffusers.training.nft import NFTTrainer
from astrolabe_diffusers.training.optimization import CollapseGuard, Optimization, make_optimizer
from astrolabe_diffusers.training.policies import (
    OLD,
    add_policies,
    leave_casts_to_autocast,
    many_passes,
    policy_parameters,
    use_policy,
)
from tests.tiny_pipeline import SMALL, tiny_pipeline
from tests.training.helpers import BRIGHTNESS, config, make_samples, policy_pipeline


pytestmark = pytest.mark.usefixtures("own_precision")


class CountingCasts(TorchDispatchMode):
    """How often each of some tensors is cast, by its address."""

    def __init__(self, tensors):
        super().__init__()
        self.counts = Counter({tensor.data_ptr(): 0 for tensor in tensors})

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.counts:
            self.counts[args[0].data_ptr()] += 1
        return function(*args, **kwargs or {})


def bf16_pipeline():
    """As `policy_pipeline`, the base in bfloat16 and the adapters, which differ, in float32."""
    pipe = policy_pipeline(target_modules=["all-linear"], vae_num_res_blocks=0, num_layers=2)
    for name, parameter in pipe.transformer.named_parameters():
        if ".lora_" not in name and parameter.ndim > 1:
            parameter.data = parameter.data.bfloat16()
    return pipe


def steps(algorithm, checkpointing="none", today=True, **values):
    """Two optimizer steps on two batches each: what they report, gradients, weights, and the second one's casts."""
    accelerator, pipe = Accelerator(mixed_precision="bf16"), bf16_pipeline()
    transformer = pipe.transformer
    if checkpointing != "none":
        transformer.enable_gradient_checkpointing(CHECKPOINTING[checkpointing])
    trainer = algorithm.__new__(algorithm)
    trainer.accelerator, trainer.step = accelerator, 0
    trainer.config = config(**values) if algorithm is NFTTrainer else AWMConfig(rewards={BRIGHTNESS: 1.0}, **values)
    trainer.sigmas = torch.tensor([1.0, 0.9375, 0.625, 0.8333])
    optimizer, schedule = make_optimizer(trainer.config, policy_parameters(transformer))
    trainer.model, optimizer, schedule = accelerator.prepare(transformer, optimizer, schedule)
    if not today:
        leave_casts_to_autocast(transformer)
    generator, samples = torch.Generator().manual_seed(5), make_samples(4)
    latents = torch.randn(4, 4, 9, 4, 4, generator=generator)
    embeds = torch.randn(4, 16, 32, generator=generator).bfloat16()
    batches = [VideoBatch(samples[s], embeds[s], latents[s], None, pipeline=pipe) for s in (slice(2), slice(2, 4))]
    ones = torch.ones(2)
    of_nft = {"optimality": 0.7 * ones, "weight": ones, "kl_weight": ones, "use_reference": ones > 0}
    step_parts = [(batch, of_nft if algorithm is NFTTrainer else {"advantages": ones}) for batch in batches]
    gradients = []

    def keep_gradients(*_):
        gradients.extend(parameter.grad.clone() for parameter in policy_parameters(transformer))

    optimizer.optimizer.register_step_pre_hook(keep_gradients)
    optimization, reports = Optimization(accelerator, trainer.model, optimizer, schedule, 1.0), []
    casts = CountingCasts([p for adapter in transformer.peft_config for p in policy_parameters(transformer, adapter)])
    for number in (1, 2):
        with casts if number == 2 else nullcontext():
            report = optimization.step(step_parts, trainer.accumulate_gradients, CollapseGuard(0), number)
        reports.append(report)
    return reports, gradients, policy_parameters(transformer), casts


@pytest.mark.parametrize("algorithm", [NFTTrainer, AWMTrainer])
@pytest.mark.parametrize(("checkpointing", "blocks_per_pass"), [("none", 7), ("selective", 7), ("full", 1)])
def test_one_cast_a_weight_and_step_changes_no_bit(algorithm, checkpointing, blocks_per_pass, monkeypatch):
    """AWM's context is the current policy's: its first pass is without gradients, and what is cast there serves the
    passes that have them."""
    values = {"blocks_per_pass": blocks_per_pass, "learning_rate": 1e-2}
    result = steps(algorithm, checkpointing, today=False, **values)
    monkeypatch.setattr("astrolabe_diffusers.training.optimization.many_passes", lambda transformer: nullcontext())
    today = steps(algorithm, checkpointing, **values)
    assert result[0] == today[0] and result[0][0]["grad_norm"] > 1e-3
    assert len(result[1]) == len(today[1]) > 0 and all(map(torch.equal, result[1], today[1]))
    assert all(map(torch.equal, result[2], today[2]))
    counts, number = result[3].counts, len(result[2])
    # AWM uses no old policy.
    assert Counter(counts.values()) == ({1: 2 * number} if algorithm is NFTTrainer else {1: number, 0: number})
    assert sum(today[3].counts.values()) > 2 * sum(counts.values())


def test_a_rollout_casts_each_weight_once_and_after_a_step_anew():
    pipe = bf16_pipeline()
    transformer = Accelerator(mixed_precision="bf16").prepare(pipe.transformer)
    leave_casts_to_autocast(transformer)
    inputs = torch.randn(1, 4, 3, 4, 4).bfloat16(), torch.tensor([500.0]), torch.randn(1, 16, 32).bfloat16()

    def passes():
        with use_policy(transformer, "old"), many_passes(transformer):
            return [transformer(*inputs, return_dict=False)[0] for _ in range(3)]

    dtypes = set()
    for layer in tuner_layers(transformer):
        layer.lora_A[OLD].register_forward_pre_hook(lambda _, inputs: dtypes.add(inputs[0].dtype))
    parameters = policy_parameters(transformer, OLD)
    with CountingCasts(parameters) as casts:
        first = passes()
    assert set(casts.counts.values()) == {1} and dtypes == {torch.bfloat16}
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(2)
    with use_policy(transformer, "old"):
        expected = transformer(*inputs, return_dict=False)[0]
    second = passes()
    assert all(torch.equal(output, expected) for output in second) and not torch.equal(first[0], expected)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_keeps_its_float32(dropout):
    pipe = tiny_pipeline(**SMALL)
    add_policies(pipe.transformer, rank=2, lora_alpha=2, lora_dropout=dropout)
    leave_casts_to_autocast(pipe.transformer)
    assert {layer.cast_input_dtype_enabled for layer in tuner_layers(pipe.transformer)} == {dropout > 0}
