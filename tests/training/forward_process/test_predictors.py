"""Windows, shared pasts and contexts of the policies, against plain forward passes."""

import functools
from dataclasses import replace
from itertools import product

import pytest
import torch
from accelerate import Accelerator

from astrolabe_diffusers import CausalWanTransformer3DModel
from astrolabe_diffusers.models.attention_causal_wan import CausalWanSelfAttnProcessor
from astrolabe_diffusers.rollout.past import Past
from astrolabe_diffusers.training.checkpointing import CHECKPOINTING
from astrolabe_diffusers.training.forward_process.noising import squared_distance
from astrolabe_diffusers.training.forward_process.predictors import BlockwisePredictor, WholeClipPredictor
from astrolabe_diffusers.training.nft.loss import nft_loss
from astrolabe_diffusers.training.nft.trainer import accumulate_gradients
from astrolabe_diffusers.training.policies import policy_parameters, use_policy
from tests.models.test_reference_causal_wan import BASE, stock_masked_forward, stock_wan
from tests.own_transformer import OwnTransformer
from tests.training.helpers import config, noised_batch, policy_pipeline


WINDOW = {"local_attn_size": 9, "sink_size": 3}
MODELS = {
    "unlimited": {},
    "window": {"local_attn_size": 9},
    "sink": WINDOW,
    "relative": {**WINDOW, "rope_mode": "relative"},
    "gap": {**WINDOW, "rope_mode": "relative", "rope_window": 11},
    "EMA sink": {**WINDOW, "rope_mode": "relative", "sink_ema": 0.7},
    "no whole blocks": {"local_attn_size": 8, "sink_size": 1, "rope_mode": "relative"},
}
NOISY = {"context": "noisy"}
PASTS = [Past(), Past(9), Past(9, shared=True)]
OWN, ADAPTIVE = {"context_policy": "own"}, {"loss_weighting": "adaptive"}


# Nothing here changes its weights.
pipeline = functools.cache(policy_pipeline)


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(mixed_precision="no")


def window_of(batch, start):
    """The same videos with the window from latent frame `start` on."""
    return replace(batch, noisy=batch.noisy[:, :, start:], past=Past(start))


def gradient(accelerator, transformer, batch, cfg):
    transformer.zero_grad()
    statistics = accumulate_gradients(accelerator, transformer, batch, cfg, len(batch.clean), True)
    return [p.grad.clone() for p in policy_parameters(transformer)], statistics


def same_past(batch, start):
    """The first video's frames before `start` for all."""
    batch.clean[1:, :, :start] = batch.clean[:1, :, :start]
    batch.prompt_embeds[:] = batch.prompt_embeds[:1]
    return batch


@pytest.mark.parametrize("model", ["unlimited", "sink", "relative", "EMA sink"])
def test_prediction_in_a_window_is_that_in_the_video(model):
    pipe = pipeline(**MODELS[model])
    transformer, batch = pipe.transformer, noised_batch(pipe, frames=18)
    whole = BlockwisePredictor(transformer, batch, "current").predict_window()
    window = BlockwisePredictor(transformer, window_of(batch, 12), "current").predict_window()
    with use_policy(transformer, "current"):
        # Without the cache, in one pass over clean and noisy blocks.
        flow = transformer(batch.noisy, batch.timestep, batch.prompt_embeds, clean_hidden_states=batch.clean).sample
    expected = batch.noisy - batch.sigma.view(-1, 1, 1, 1, 1) * flow
    assert list(window) == [12, 15]
    for start, prediction in window.items():
        assert (prediction - whole[start]).abs().max() < 1e-6
        assert (prediction - expected[:, :, start : start + 3]).abs().max() < 1e-5


@pytest.mark.parametrize("context_policy", ["own", "old"])
@pytest.mark.parametrize("model", [{}, WINDOW])
def test_windowed_gradients_are_the_video_s_restricted_to_the_window(accelerator, model, context_policy):
    """With a detached context the loss of the whole video is a sum over blocks: drop the blocks before the window."""
    pipe, cfg = pipeline(**model), config(context_policy=context_policy)
    batch = noised_batch(pipe, frames=12)
    whole, _ = gradient(accelerator, pipe.transformer, batch, cfg)
    # The video ends where the window begins: what is left of the gradient is the window's share.
    before = replace(batch, clean=batch.clean[:, :, :6], noisy=batch.noisy[:, :, :6])
    first, _ = gradient(accelerator, pipe.transformer, before, cfg)
    window, _ = gradient(accelerator, pipe.transformer, window_of(batch, 6), cfg)
    expected = [(12 * w - 6 * f) / 6 for w, f in zip(whole, first)]
    assert max(e.abs().max() for e in expected) > 1e-4
    torch.testing.assert_close(window, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("context_policy", ["own", "old"])
@pytest.mark.parametrize("model", ["unlimited", "sink", "relative", "EMA sink"])
def test_a_past_kept_once_changes_nothing(accelerator, model, context_policy):
    pipe, cfg = pipeline(**MODELS[model]), config(context_policy=context_policy)
    batch = window_of(same_past(noised_batch(pipe, batch_size=3, frames=15), 9), 9)
    expected, statistics = gradient(accelerator, pipe.transformer, batch, cfg)
    batch.past = Past(9, shared=True)
    result, shared_statistics = gradient(accelerator, pipe.transformer, batch, cfg)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(shared_statistics, statistics, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "model, values, past",
    [
        *((*case, past) for case in [*product(MODELS, [{}]), ("sink", OWN), ("relative", OWN)] for past in PASTS),
        ("relative", ADAPTIVE, Past()),
    ],
)
def test_gradients_of_several_blocks_a_pass(accelerator, model, values, past):
    """Five blocks, each by itself, two a pass, and all in one; values, too, are means over blocks."""
    pipe = pipeline(**MODELS[model])
    batch = same_past(noised_batch(pipe, frames=past.num_frames + 15), past.num_frames)
    batch = replace(batch, noisy=batch.noisy[:, :, past.num_frames :], past=past)
    expected, statistics = gradient(accelerator, pipe.transformer, batch, config(blocks_per_pass=1, **values))
    assert min(e.abs().max() for e in expected) > 1e-4
    for number in (2, 5):
        result, packed = gradient(accelerator, pipe.transformer, batch, config(blocks_per_pass=number, **values))
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(packed, statistics, rtol=1e-5, atol=1e-5)


def test_gradients_with_checkpointing(accelerator):
    pipe = policy_pipeline(**MODELS["relative"])
    batch = window_of(noised_batch(pipe, frames=18), 3)
    expected, _ = gradient(accelerator, pipe.transformer, batch, config(blocks_per_pass=1))
    pipe.transformer.enable_gradient_checkpointing()
    result, _ = gradient(accelerator, pipe.transformer, batch, config(blocks_per_pass=3))
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "model, values, checkpointing", [("relative", {"blocks_per_pass": 2}, "selective"), ("window", NOISY, "full")]
)
def test_gradients_of_every_linear_layer_are_finite_differences(accelerator, model, values, checkpointing):
    """Of the loss as a step has it, where a LoRA is outside of the blocks too: what it adds to the embeddings of text
    and time reaches every block. The clean blocks' K/V are the old policy's, and constants."""
    pipe = policy_pipeline(**MODELS[model], target_modules=["all-linear"])
    pipe.transformer.enable_gradient_checkpointing(CHECKPOINTING[checkpointing])
    transformer, batch = pipe.transformer, noised_batch(pipe, frames=12)
    cfg = config(**{"context_policy": "old"} | values)
    gradients, _ = gradient(accelerator, transformer, batch, cfg)
    names = [name for name, _ in transformer.named_parameters() if ".default." in name]
    places, step = {}, 5e-3
    for i, name in enumerate(names):
        places.setdefault("blocks" if name.startswith("blocks") else name.partition(".lora_")[0], []).append(i)
    assert len(places) == 1 + 6
    parameters = policy_parameters(transformer)
    for module, indices in places.items():
        # Along the gradient the slope is its norm.
        slope = sum(gradients[i].square().sum() for i in indices).sqrt().item()
        losses = []
        for distance in (step, -2 * step):
            for i in indices:
                parameters[i].data.add_(gradients[i], alpha=distance / slope)
            losses.append(gradient(accelerator, transformer, batch, cfg)[1]["loss"].item() / len(batch.clean))
        for i in indices:
            parameters[i].data.add_(gradients[i], alpha=step / slope)
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=1e-3), module


def count_linears(accelerator, transformer, batch, cfg):
    """Calls of Linear layers in a step, those of LoRAs apart; and the frames of the model's passes."""
    calls, frames = [], []
    handles = [transformer.register_forward_pre_hook(lambda module, args: frames.append(args[0].shape[2]))]
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and ".lora_" not in name:
            handles.append(module.register_forward_pre_hook(lambda *_: calls.append(1)))
    gradient(accelerator, transformer, batch, cfg)
    for handle in handles:
        handle.remove()
    return len(calls), frames


def test_passes_over_81_frames(accelerator):
    """Seven blocks: the clean ones but the last, and those of three policies."""
    pipe = pipeline()
    transformer, batch = pipe.transformer, noised_batch(pipe, frames=21)
    each, frames = count_linears(accelerator, transformer, batch, config(blocks_per_pass=1))
    assert frames == [3, 3, 3, 3] * 6 + [3, 3, 3]
    some, frames = count_linears(accelerator, transformer, batch, config(blocks_per_pass=3))
    assert frames == [6, 9, 9, 9] + [9, 9, 9, 9] + [3, 3, 3, 3]
    packed, frames = count_linears(accelerator, transformer, batch, config())
    assert frames == [18, 21, 21, 21]
    assert each > 2 * some and each > 6 * packed
    for size, number in ((1, packed), (2, some), (4, each), (8, each)):
        cfg = config(blocks_per_pass=None, train_batch_size=size)
        assert count_linears(accelerator, transformer, batch, cfg)[0] == number


class SubclassOfOurs(CausalWanSelfAttnProcessor):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


@pytest.mark.parametrize("own", ["processor", "transformer"])
def test_who_knows_one_block_a_pass_is_given_one(accelerator, own):
    pipe = policy_pipeline(**({"transformer": OwnTransformer()} if own == "transformer" else {}))
    if own == "processor":
        pipe.transformer.blocks[1].attn1.set_processor(SubclassOfOurs())
    batch = noised_batch(pipe, frames=9)
    expected, _ = gradient(accelerator, pipe.transformer, batch, config(blocks_per_pass=1))
    result, _ = gradient(accelerator, pipe.transformer, batch, config(blocks_per_pass=3))
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    _, frames = count_linears(accelerator, pipe.transformer, batch, config(blocks_per_pass=3))
    assert set(frames) == {3}


class SaysSo(CausalWanTransformer3DModel):
    packs_clips = True


def test_who_knows_several_blocks_a_pass_says_so(accelerator):
    pipe = policy_pipeline()
    batch = noised_batch(pipe, frames=9)
    expected, _ = gradient(accelerator, pipe.transformer, batch, config(blocks_per_pass=1))
    pipe.transformer.__class__ = SaysSo
    pipe.transformer.blocks[0].attn1.set_processor(SubclassOfOurs())
    result, _ = gradient(accelerator, pipe.transformer, batch, config())
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert count_linears(accelerator, pipe.transformer, batch, config())[1] == [6, 9, 9, 9]


def test_context_of_the_old_policy(accelerator):
    """All policies predict with the old one's K/V: the loss in plain code, from one pass of each over both halves."""
    pipe, cfg = pipeline(), config(context_policy="old")
    transformer, batch = pipe.transformer, noised_batch(pipe)
    past = BlockwisePredictor(transformer, batch, "old")
    first, second = past.blocks
    old = [past.predict_as("old", first)]
    past.advance(first)
    old = torch.cat([*old, past.predict_as("old", second)], dim=2)
    empty = BlockwisePredictor(transformer, batch, "reference")
    reference = torch.cat([empty.predict_as("reference", first), past.predict_as("reference", second)], dim=2)
    transformer.zero_grad()
    current = torch.cat([BlockwisePredictor(transformer, batch, "current").predict(first), past.predict(second)], 2)
    loss = nft_loss(current, old, batch.clean, batch.optimality, cfg.beta)
    loss = (loss + cfg.kl_weight * squared_distance(current, reference)).mean()
    loss.backward()
    expected = [p.grad.clone() for p in policy_parameters(transformer)]
    result, statistics = gradient(accelerator, transformer, batch, cfg)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(statistics["loss"] / 2, loss.detach())
    own, _ = gradient(accelerator, transformer, batch, config(context_policy="own"))
    assert max((a - b).abs().max() for a, b in zip(own, result)) > 1e-4


def test_noisy_context_is_one_pass_over_the_noisy_video(accelerator):
    pipe, cfg = pipeline(), config(context="noisy")
    transformer, batch = pipe.transformer, noised_batch(pipe)

    def predict():
        flow = transformer(batch.noisy, batch.timestep, batch.prompt_embeds).sample
        return batch.noisy - batch.sigma.view(-1, 1, 1, 1, 1) * flow

    predictions = {}
    for policy in ("old", "reference"):
        with use_policy(transformer, policy):
            predictions[policy] = predict()
    transformer.zero_grad()
    current = predict()
    loss = nft_loss(current, predictions["old"], batch.clean, batch.optimality, cfg.beta)
    loss = (loss + cfg.kl_weight * squared_distance(current, predictions["reference"])).mean()
    loss.backward()
    expected = [p.grad.clone() for p in policy_parameters(transformer)]
    result, _ = gradient(accelerator, transformer, batch, cfg)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-7)
    clean = BlockwisePredictor(transformer, batch, "current").predict_window()[3]
    noisy = WholeClipPredictor(transformer, batch, "current").predict_window()[0][:, :, 3:]
    assert (clean - noisy).abs().max() > 1e-3


@pytest.mark.parametrize("model", ["unlimited", "sink", "relative", "EMA sink"])
def test_noisy_context_is_the_release_s_mask(model):
    """Diffusers' own model with the released mask: a window of 9 frames that ends with the block, and no sink."""
    model = MODELS[model]
    pipe = pipeline(**model)
    transformer, batch = pipe.transformer, noised_batch(pipe, frames=18)
    result = WholeClipPredictor(transformer, batch, "base").predict_window()[0]
    assert transformer.config.sink_size == model.get("sink_size", 0)  # for the next video

    weights = {n.replace(".base_layer", ""): p for n, p in transformer.state_dict().items() if ".lora_" not in n}
    config = {name: transformer.config[name] for name in BASE}
    frame = torch.arange(18).repeat_interleave(4)  # of each token
    end = (frame // 3 + 1) * 3
    mask = frame[None, :] < end[:, None]
    if model:
        mask &= frame[None, :] >= end[:, None] - 9
    timestep = batch.timestep[:, None].expand(-1, 18)
    flow = stock_masked_forward(stock_wan(config, weights), batch.noisy, timestep, batch.prompt_embeds, mask)
    expected = batch.noisy - batch.sigma.view(-1, 1, 1, 1, 1) * flow
    assert (result - expected).abs().max() < 1e-5
    if model:
        with use_policy(transformer, "base"):
            with_sink = transformer(batch.noisy, batch.timestep, batch.prompt_embeds).sample
        assert (with_sink - flow)[:, :, :9].abs().max() < 1e-5  # the window has not moved on yet
        assert (with_sink - flow)[:, :, 9:].abs().max() > 1e-2


def test_kl_of_some_samples(accelerator):
    """`kl_weight` of each sample; and without any the reference is not asked."""
    pipe = pipeline()
    batch, calls = noised_batch(pipe), []
    with_all, _ = gradient(accelerator, pipe.transformer, batch, config())
    without, _ = gradient(accelerator, pipe.transformer, batch, config(kl_weight=0.0))
    batch.kl_weight = torch.tensor([0.0, 2.0])
    second, _ = gradient(accelerator, pipe.transformer, batch, config())
    batch.kl_weight = torch.tensor([2.0, 0.0])
    first, _ = gradient(accelerator, pipe.transformer, batch, config())
    mean = [(a + b) / 2 for a, b in zip(first, second)]
    torch.testing.assert_close(mean, with_all, rtol=1e-3, atol=1e-6)
    assert max((a - b).abs().max() for a, b in zip(first, without)) > 1e-4
    batch.kl_weight, batch.use_reference = torch.zeros(2), False
    hook = pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    none, _ = gradient(accelerator, pipe.transformer, batch, config())
    hook.remove()
    torch.testing.assert_close(none, without)
    assert len(calls) == 3  # the clean block, and both noisy ones as two policies
