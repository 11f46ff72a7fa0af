"""Training of a model with a memory bank: what a block sees is what it saw when the video was made."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.rollout.past import Past
from astrolabe_diffusers.training.forward_process.predictors import BlockwisePredictor, check_context
from astrolabe_diffusers.training.policies import use_policy
from tests.reference_memory_bank import ReferenceMemoryBank
from tests.training.forward_process.test_predictors import config, gradient, noised_batch, same_past, window_of
from tests.training.helpers import policy_pipeline


BANK = {"local_attn_size": 6, "sink_size": 3, "memory_bank_size": 2, "memory_bank_interval": 1}
FRAMES = 24


@pytest.fixture(scope="module")
def pipe():
    return policy_pipeline(**BANK)


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(mixed_precision="no")


def weights_of(transformer, policy):
    """As a plain transformer has them."""
    with use_policy(transformer, policy, merge=True):
        names = {name: name.replace(".base_layer", "") for name in transformer.state_dict() if ".lora_" not in name}
        return {names[name]: transformer.state_dict()[name].double().clone() for name in names}


def expected_predictions(transformer, batch, others):
    """What the old policy and others predict of each block, in plain code. The old one comes first, as when the video
    was made, and so its text chooses."""
    weights = {policy: weights_of(transformer, policy) for policy in ("old", *others)}
    reference = ReferenceMemoryBank(weights["old"], dict(transformer.config))
    context = reference.context_of(batch.clean[:, :, :0], batch.prompt_embeds)
    predictions = {policy: [] for policy in weights}
    for noisy, clean in zip(batch.noisy.split(3, dim=2), batch.clean.split(3, dim=2)):
        for policy in ("old", *others):
            reference.weights = weights[policy]
            flow = reference.block(noisy, batch.timestep, batch.prompt_embeds, context, store=False)
            predictions[policy].append(noisy - batch.sigma.view(-1, 1, 1, 1, 1) * flow)
        reference.weights = weights["old"]
        reference.block(clean, torch.zeros(len(clean)), batch.prompt_embeds, context, store=True)
    return {policy: torch.cat(blocks, dim=2) for policy, blocks in predictions.items()}


def policies_of_other_texts(**settings):
    """The text has quite other keys for the current policy."""
    pipe = policy_pipeline(**{**BANK, **settings})
    for name, parameter in pipe.transformer.named_parameters():
        if ".attn2.to_k.lora_B.default." in name:
            parameter.data.mul_(30)
    return pipe


@torch.no_grad()
def test_after_a_past_kept_once_its_policy_has_chosen():
    pipe = policies_of_other_texts()
    batch = same_past(noised_batch(pipe, batch_size=3, frames=FRAMES), 18)
    expected = expected_predictions(pipe.transformer, batch, ["current"])["current"]
    for start in range(9, 21, 3):
        window = replace(window_of(batch, start), past=Past(start, shared=True))
        predictor = BlockwisePredictor(pipe.transformer, window, "old")
        first = predictor.passes[0]
        assert (predictor.predict_as("current", first) - expected[:, :, first]).abs().max() < 1e-5


@pytest.mark.parametrize("update", ["once", "interactive", "single_prompt"])
@torch.no_grad()
def test_the_replay_has_the_bank_of_the_rollout(update):
    """Whichever policy predicts: the old one's text chooses, though that of others would choose otherwise."""
    pipe = policies_of_other_texts(memory_bank_update=update)
    transformer, batch = pipe.transformer, noised_batch(pipe, batch_size=3, frames=FRAMES)
    expected = expected_predictions(transformer, batch, ["current", "reference"])
    predictor = BlockwisePredictor(transformer, batch, "old", blocks_per_pass=7)
    for frames in predictor.passes:
        for policy in ("current", "reference", "old"):
            result = predictor.predict_as(policy, frames)
            assert (result - expected[policy][:, :, frames]).abs().max() < 1e-5
        predictor.advance(frames)
    window = BlockwisePredictor(transformer, window_of(batch, 18), "old")
    for frames in window.passes:
        result = window.predict_as("current", frames)
        assert (result - expected["current"][:, :, frames]).abs().max() < 1e-5
        window.advance(frames)


@pytest.mark.parametrize("context_policy", ["own", "old"])
def test_a_block_a_pass_whatever_is_asked_for(accelerator, pipe, context_policy):
    batch = window_of(noised_batch(pipe, frames=FRAMES), 9)
    values = {"context_policy": context_policy}
    expected, statistics = gradient(accelerator, pipe.transformer, batch, config(blocks_per_pass=1, **values))
    result, packed = gradient(accelerator, pipe.transformer, batch, config(blocks_per_pass=4, **values))
    assert min(e.abs().max() for e in expected) > 1e-4
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    torch.testing.assert_close(packed, statistics, rtol=0, atol=0)


@pytest.mark.parametrize("context_policy", ["own", "old"])
def test_a_past_kept_once_changes_nothing(accelerator, pipe, context_policy):
    cfg = config(context_policy=context_policy)
    batch = window_of(same_past(noised_batch(pipe, batch_size=3, frames=FRAMES), 12), 12)
    expected, statistics = gradient(accelerator, pipe.transformer, batch, cfg)
    batch.past = Past(12, shared=True)
    result, shared_statistics = gradient(accelerator, pipe.transformer, batch, cfg)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(shared_statistics, statistics, rtol=1e-4, atol=1e-6)


def test_gradients_with_checkpointing(accelerator):
    pipe = policy_pipeline(**BANK)
    batch = noised_batch(pipe, frames=FRAMES)
    expected, _ = gradient(accelerator, pipe.transformer, batch, config())
    pipe.transformer.enable_gradient_checkpointing()
    result, _ = gradient(accelerator, pipe.transformer, batch, config())
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_a_noisy_context_is_refused(pipe):
    check_context(config(context="clean"), pipe.transformer)
    with pytest.raises(UserError, match="memory bank.*context=clean"):
        check_context(config(context="noisy"), pipe.transformer)
