"""The weight of a LoRA belongs to the call."""

import threading
import time

import pytest
import torch
from peft import LoraConfig

from astrolabe_diffusers.models.lora_layers import adapter_weights
from tests.tiny_pipeline import tiny_pipeline


PROMPT = "a red circle moves left on a black background"


@pytest.fixture(scope="module")
def with_loras():
    # Two blocks of a frame each, in two steps.
    size = {"height": 16, "width": 32, "num_frames": 5, "num_frames_per_block": 1, "vae_num_res_blocks": 0}
    pipe = tiny_pipeline(**size, sigmas=(1.0, 0.5))
    torch.manual_seed(0)
    for name in ("x", "y"):
        config = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
        pipe.transformer.add_adapter(config, name)
    return pipe


@pytest.fixture
def pipe(with_loras):
    with_loras.transformer.eval()
    with_loras.set_adapters(["x", "y"])
    with_loras.set_adapters("x")
    return with_loras


def video(pipe, scale=None):
    kwargs = None if scale is None else {"scale": scale}
    generator = torch.Generator().manual_seed(0)
    return pipe(PROMPT, generator=generator, output_type="latent", attention_kwargs=kwargs).frames


def weights(pipe):
    return [dict(module.scaling) for module in pipe.transformer.modules() if hasattr(module, "scaling")]


@pytest.mark.parametrize("weight", [0.1, 1.0, 0.7])
@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0, 1e-30])
def test_scale_of_a_call(pipe, weight, scale):
    """It multiplies the weight in this call, and the weight is then what it was, to the last bit."""
    pipe.set_adapters(["x", "y"], [weight, 0.2])
    before, as_before = weights(pipe), video(pipe)
    scaled = video(pipe, scale)
    assert weights(pipe) == before
    assert torch.equal(video(pipe), as_before)
    pipe.set_adapters(["x", "y"], [weight * scale, 0.2 * scale])
    assert (video(pipe) - scaled).abs().max() < 1e-5


def test_weights_inside_a_block_of_code(pipe):
    """They are those of `set_adapters`, by name, and what they were afterwards, also after an error."""
    pipe.set_adapters(["x", "y"], [0.4, 0.2])
    before = weights(pipe)
    with adapter_weights(pipe.transformer, {"y": 0.9, "x": 0.0}):
        inside = video(pipe)
    assert weights(pipe) == before
    with pytest.raises(ZeroDivisionError), adapter_weights(pipe.transformer, {"x": 2.0}):
        1 / 0
    assert weights(pipe) == before
    with pytest.raises(ValueError, match="has to be a finite number"), adapter_weights(pipe.transformer, {"x": None}):
        pass
    pipe.set_adapters(["x", "y"], [0.0, 0.9])
    assert torch.equal(video(pipe), inside)


def test_scale_is_put_back_after_an_error(pipe):
    before = weights(pipe)
    latents, text_of_another_width = torch.zeros(1, 4, 3, 8, 8), torch.zeros(1, 2, 7)
    with pytest.raises(RuntimeError):
        pipe.transformer(latents, torch.ones(1), text_of_another_width, attention_kwargs={"scale": 0.5})
    assert weights(pipe) == before


def test_threads_do_not_see_each_others_scale(pipe):
    alone = {scale: video(pipe, scale) for scale in (0.5, 0.1)}
    # Gives way to the other thread in the middle of a forward, where peft's layers have this call's weights.
    hook = pipe.transformer.blocks[0].register_forward_pre_hook(lambda *_: time.sleep(0.001))
    results = {}
    threads = [
        threading.Thread(target=lambda scale=scale: results.__setitem__(scale, video(pipe, scale))) for scale in alone
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hook.remove()
    assert all(torch.equal(results[scale], alone[scale]) for scale in alone)
    assert {weight for layer in weights(pipe) for weight in layer.values()} == {1.0}


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "0.5"])
def test_weights_that_are_none(pipe, weight):
    before = weights(pipe)
    for call in (
        lambda: pipe.set_adapters("x", weight),
        lambda: pipe.set_adapters(["x", "y"], [1.0, weight]),
        lambda: pipe.set_adapters("x", {"transformer": {"blocks.0": weight}}),
        lambda: video(pipe, weight),
    ):
        with pytest.raises(ValueError, match="has to be a finite number"):
            call()
    assert weights(pipe) == before


def test_unknown_attention_kwargs(pipe):
    with pytest.raises(ValueError, match="`attention_kwargs` may have scale, and has 'scal'"):
        pipe(PROMPT, attention_kwargs={"scal": 0.5})


def test_dora_has_one_weight(pipe):
    """peft would scale B A inside the norm: with the weight 0 that is not the model without the LoRA."""
    other = tiny_pipeline()
    other.transformer.add_adapter(
        LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False, use_dora=True), "dora"
    )
    video(other, 1.0)
    other.set_adapters("dora", 1.0)
    for call in (lambda: other.set_adapters("dora", 0.5), lambda: video(other, 0.5)):
        with pytest.raises(ValueError, match="dora is a DoRA, which can only be applied with weight 1"):
            call()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_of_a_scaled_call(pipe, checkpointing):
    """Against a central difference, also where blocks are computed again after the call."""
    transformer = pipe.transformer
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 4, 3, 4, 4, generator=generator), torch.tensor([500.0]), torch.randn(1, 16, 32)

    def loss():
        transformer.train()
        return transformer(*inputs, attention_kwargs={"scale": 0.3}, return_dict=False)[0].double().square().mean()

    transformer.zero_grad()
    loss().backward()
    parameter = transformer.blocks[0].attn1.to_q.lora_B["x"].weight
    direction = parameter.grad / parameter.grad.norm()
    values = []
    for step in (1e-2, -1e-2):
        with torch.no_grad():
            parameter += step * direction
            values.append(loss().item())
            parameter -= step * direction
    transformer.disable_gradient_checkpointing()
    assert abs((values[0] - values[1]) / 2e-2 / parameter.grad.norm().item() - 1) < 1e-2
