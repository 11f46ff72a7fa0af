"""The replay of videos that changed their prompt: the rollout's cache, and gradients against a slow reference."""

import functools

import pytest
import torch
from accelerate import Accelerator

from astrolabe_diffusers.pipelines.block_generation import BlockGenerator
from astrolabe_diffusers.pipelines.scene_prompt import TRANSITIONS
from astrolabe_diffusers.rollout.past import Past, Switch
from astrolabe_diffusers.rollout.prompts import Prompt
from astrolabe_diffusers.rollout.samples import Sample, SampleScene
from astrolabe_diffusers.rollout.sampling import Rollout
from astrolabe_diffusers.training.forward_process.noising import NoisedBatch
from astrolabe_diffusers.training.forward_process.predictors import SwitchPredictor
from astrolabe_diffusers.training.nft.trainer import accumulate_gradients
from astrolabe_diffusers.training.policies import policy_parameters, use_policy
from tests.own_transformer import OwnTransformer
from tests.reference_causal_wan import ReferenceCausalWan
from tests.reference_transitions import SlowScenes
from tests.tiny_pipeline import tiny_transformer
from tests.training.helpers import config, noised_batch, policy_pipeline
from tests.two_experts import sizes_of


OLD, NEW = "a red circle moves left on a black background", "a green cross moves up on a white background"
SIZE = {"height": 16, "width": 32, "num_frames": 69}  # 18 latent frames
RELATIVE = {"local_attn_size": 9, "sink_size": 3, "rope_mode": "relative"}
MODELS = {
    "unlimited": {},
    "window": {"local_attn_size": 9, "sink_size": 3},
    "relative": RELATIVE,
    "no whole blocks": {"local_attn_size": 8, "sink_size": 1, "rope_mode": "relative"},
}
SWITCHES = {
    **{name: Switch(12, name) for name in TRANSITIONS},
    "roll over 3": Switch(9, "roll", num_blocks=3),
    "recache without the sink": Switch(12, "recache", global_sink=False),
}
BANK = {"local_attn_size": 6, "sink_size": 3, "memory_bank_size": 2, "memory_bank_interval": 1}
OTHERS = {"EMA sink": {**RELATIVE, "sink_ema": 0.7}, "memory bank": BANK, "past weight": {"past_weight": 0.5}}


# Nothing here changes its weights.
pipeline = functools.cache(policy_pipeline)


class Remembering(BlockGenerator):
    """Keeps what every layer had for each block, keys and values, its videos being those of the `seen` list."""

    seen: list

    def denoise(self, *args):
        latents = super().denoise(*args)
        # Its first pass has stored the block before.
        self.seen.append(in_use(self.kv_cache))
        return latents


@functools.cache
def remembering_pipeline(model):
    sizes = {"vae_num_res_blocks": 0, "sigmas": [1.0, 0.5]}
    if model == "own transformer":
        pipe = policy_pipeline(transformer=OwnTransformer(), **sizes)
    else:
        pipe = policy_pipeline(**(MODELS | OTHERS).get(model, RELATIVE), **sizes)
    if model == "two experts":
        pipe.register_modules(memory_transformer=tiny_transformer(seed=1, **sizes_of(pipe.transformer)))
    pipe.block_generator_class = Remembering
    return pipe


def in_use(cache):
    """Keys and values in use of all layers; of videos that share their past, those of each."""
    parts = []
    for layer in cache.layer_caches:
        stored = cache.state.end - cache.state.num_cached * cache.state.frame_tokens
        for buffer, past in zip((layer.key, layer.value), layer.past or (None, None)):
            tokens = [] if buffer is None else [buffer[:, stored : cache.state.end].clone()]
            if past is not None:
                tokens.append(past.clone().expand(cache.state.shape[0], -1, -1, -1))
            parts += tokens
    return parts


@pytest.mark.parametrize(
    "switch, shared",
    [
        *((name, False) for name in SWITCHES),
        # After a cut there is nothing to share; a roll over blocks and a RoPE cut are a roll and a flush, and more.
        *((name, True) for name in SWITCHES if name not in ("cut", "roll", "flush")),
    ],
)
@pytest.mark.parametrize("model", [*MODELS, *OTHERS, "own transformer", "two experts"])
def test_the_replay_has_the_rollout_s_cache(model, switch, shared):
    """Also, the prediction from the noisy latents of a block's last step is the block that came of it."""
    pipe, switch = remembering_pipeline(model), SWITCHES[switch]
    if switch.transition not in pipe.transitions:
        pytest.skip("this model has no such transition")
    Remembering.seen = seen = []
    scenes = SampleScene(OLD), SampleScene(NEW, switch)
    samples = [Sample(Prompt(NEW), 0, (7, 0, 0, k), scenes) for k in range(2)]
    past = Past(12, shared, switch)

    class Silent:
        """In place of a scoring thread."""

        def submit(self, *args):
            return None

    with use_policy(pipe.denoiser, "old"):
        (batch,) = Rollout(pipe, Silent()).generate([samples], SIZE, past, keep_trajectory=True)
    blocks = batch.trajectory.latents[-2:]
    noisy = torch.cat([block[-2] for block in blocks], dim=2)
    timestep = batch.trajectory.timesteps[-1][-1].float().expand(2)
    made = batch.prompt_embeds, past, batch.old_prompt_embeds, pipe
    replayed = NoisedBatch(batch.latents, noisy, timestep / 1000, timestep, *made)
    predictor = SwitchPredictor(pipe.denoiser, replayed, "old")
    assert [frames.start for frames in predictor.passes] == [12, 15]
    for frames, expected in zip(predictor.passes, seen[-2:]):
        clean = predictor.predict_as("old", frames)
        assert (clean - batch.latents[:, :, frames]).abs().max() < 2e-5
        actual = in_use(predictor.cache)
        # Nothing is there before the first block, nor after a cut.
        assert len(actual) == len(expected)
        for x, y in zip(actual, expected):
            torch.testing.assert_close(x, y, rtol=0, atol=2e-5)
        predictor.advance(frames)


def folded_weights(transformer):
    """Weights with the current policy's LoRA, in double precision, and leaves for its parameters, in their order."""
    state = {name: tensor.detach().double() for name, tensor in transformer.state_dict().items()}
    leaves = {name: x.requires_grad_() for name, x in state.items() if ".default." in name}
    scale = transformer.peft_config["default"].lora_alpha / transformer.peft_config["default"].r
    weights = {}
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        plain, adapted = name.replace(".base_layer", ""), name.endswith(".base_layer.weight")
        module = name.removesuffix(".base_layer.weight")
        if adapted:
            a, b = (leaves[f"{module}.lora_{part}.default.weight"] for part in "AB")
            tensor = tensor + scale * b @ a
        weights[plain] = tensor
    order = [name for name, _ in transformer.named_parameters() if ".default." in name]
    return weights, [leaves[name] for name in order]


def slow_predictions(pipe, batch):
    """Of the window's blocks, and the leaves that they are differentiable in."""
    weights, leaves = folded_weights(pipe.transformer)
    switch, past, n = batch.past.switch, batch.past.num_frames, pipe.transformer.config.num_frames_per_block
    slow = SlowScenes(ReferenceCausalWan(weights, dict(pipe.transformer.config)))
    clean, predictions, began = batch.clean.double(), [], 0
    slow.video = clean[:, :, :0]
    old, new = batch.old_prompt_embeds, batch.prompt_embeds
    for first in range(0, clean.shape[2], n):
        since = (first - switch.frame) // n
        text = old if since < 0 else new
        if switch.num_blocks > 1 and 0 <= since < switch.num_blocks:
            text = old + (new - old) * since / (switch.num_blocks - 1)
        transition = switch.transition if since == 0 else "roll"
        with torch.no_grad():
            if transition == "recache":
                slow.recache(text, switch.global_sink)
            elif transition in ("flush", "rope_cut"):
                slow.flush()
            elif transition == "cut":
                slow, began = SlowScenes(slow.slow), first
                slow.video = clean[:, :, :0]
        seen, start, cut = slow.seen(n), first - began, transition == "rope_cut"
        if first >= past:
            noisy = batch.noisy[:, :, first - past : first - past + n].double()
            flows = [
                slow.run(noisy[i : i + 1], t, text[i : i + 1], rows(seen, i), start, cut)[0]
                for i, t in enumerate(batch.timestep)
            ]
            predictions.append(noisy - batch.sigma.view(-1, 1, 1, 1, 1).double() * torch.cat(flows))
        block = clean[:, :, first : first + n]
        with torch.no_grad():
            _, frames = slow.run(block, 0, text, seen, start, cut)
        slow.memory, slow.video = slow.memory + frames, torch.cat([slow.video, block], dim=2)
        if slow.slow.window != -1:
            recent = slow.memory[slow.slow.sink :][-(slow.slow.window - slow.slow.sink) :]
            slow.memory = slow.memory[: slow.slow.sink] + recent
    return predictions, leaves


def rows(seen, i):
    """The frames of one video."""
    result = []
    for frame in seen:
        layers = [(key[i : i + 1], value[i : i + 1]) for key, value in frame.layers]
        result.append(type(frame)(frame.index, layers))
    return result


@pytest.mark.parametrize(
    "switch, shared",
    # After a cut there is nothing to share.
    [(name, shared) for name in SWITCHES for shared in (False, True) if not (shared and name == "cut")],
)
@pytest.mark.parametrize("model", ["unlimited", "relative"])
def test_gradients_are_plain_autograd_s(model, switch, shared):
    pipe, switch = pipeline(**MODELS[model]), SWITCHES[switch]
    pipe.transformer.zero_grad()
    batch = noised_batch(pipe, frames=18)
    batch.old_prompt_embeds, batch.pipeline = torch.flip(batch.prompt_embeds, [1]), pipe
    batch.noisy, batch.past = batch.noisy[:, :, 12:], Past(12, shared, switch)
    if shared:
        for tensor in (batch.clean[:, :, :12], batch.prompt_embeds, batch.old_prompt_embeds):
            tensor[1:] = tensor[:1]
    expected, leaves = slow_predictions(pipe, batch)
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(3)) for x in expected]
    gradients = torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, expected)), leaves)

    predictor = SwitchPredictor(pipe.transformer, batch, "current")
    for frames, weight, prediction in zip(predictor.passes, weights, expected):
        result = predictor.predict(frames)
        assert (result - prediction).abs().max() < 2e-5
        (weight * result).sum().backward()
        predictor.advance(frames)
    assert min(g.abs().max() for g in gradients) > 1e-3
    for parameter, gradient in zip(policy_parameters(pipe.transformer), gradients):
        torch.testing.assert_close(parameter.grad.double(), gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("policy", ["own", "old"])
@pytest.mark.parametrize("switch", ["roll over 3", "recache", "rope_cut"])
def test_a_shared_past_changes_nothing_in_a_step(switch, policy):
    """A step of NFT, whose policies see a past each, or that of the old one."""
    pipe, accelerator = pipeline(**RELATIVE), Accelerator(mixed_precision="no")
    batch, results = noised_batch(pipe, batch_size=3, frames=18), []
    batch.old_prompt_embeds, batch.pipeline = torch.flip(batch.prompt_embeds, [1]), pipe
    batch.noisy = batch.noisy[:, :, 15:]
    for tensor in (batch.clean[:, :, :15], batch.prompt_embeds, batch.old_prompt_embeds):
        tensor[1:] = tensor[:1]
    for shared in (False, True):
        batch.past = Past(15, shared, SWITCHES[switch])
        pipe.transformer.zero_grad()
        statistics = accumulate_gradients(accelerator, pipe.transformer, batch, config(context_policy=policy), 3, True)
        results.append(([p.grad.clone() for p in policy_parameters(pipe.transformer)], statistics))
    assert min(g.abs().max() for g in results[0][0]) > 1e-5
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("switch", ["roll", "recache", "rope_cut"])
def test_gradients_with_checkpointing(switch):
    """What is computed again in the backward pass sees what it saw."""
    pipe, accelerator, results = policy_pipeline(**RELATIVE), Accelerator(mixed_precision="no"), []
    batch = noised_batch(pipe, frames=18)
    batch.old_prompt_embeds, batch.pipeline = torch.flip(batch.prompt_embeds, [1]), pipe
    batch.noisy, batch.past = batch.noisy[:, :, 12:], Past(12, switch=SWITCHES[switch])
    for _ in range(2):
        pipe.transformer.zero_grad()
        accumulate_gradients(accelerator, pipe.transformer, batch, config(), 2, True)
        results.append([p.grad.clone() for p in policy_parameters(pipe.transformer)])
        pipe.transformer.enable_gradient_checkpointing()
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
