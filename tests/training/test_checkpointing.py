"""Gradient checkpointing: the same gradients, and what is computed twice."""

import pytest
import torch
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode

from astrolabe_diffusers.training.checkpointing import CHECKPOINTING
from tests.tiny_pipeline import tiny_transformer


class Calls(TorchDispatchMode):
    """Counts operators, the backward pass's included."""

    def __init__(self):
        super().__init__()
        self.attention = self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        self.attention += "scaled_dot_product" in name and "backward" not in name
        self.products += name in ("aten.addmm.default", "aten.mm.default")
        return function(*args, **(kwargs or {}))


def step(transformer, kind):
    """Gradients of a block that sees one before it, and what was called for them."""
    transformer.disable_gradient_checkpointing()
    if kind != "none":
        transformer.enable_gradient_checkpointing(CHECKPOINTING[kind])
    generator = torch.Generator().manual_seed(0)
    clean, noisy = torch.randn(2, 1, 4, 3, 4, 4, generator=generator)
    text, cache = torch.randn(1, 5, 32, generator=generator), transformer.new_kv_cache(max_frames=6)
    with torch.no_grad():
        transformer(clean, torch.zeros(1), text, kv_cache=cache, kv_cache_mode="write")
    with Calls() as calls:
        time = torch.full((1,), 500.0)
        flow = transformer(noisy, time, text, kv_cache=cache, kv_cache_mode="read", frame_offset=3).sample
        flow.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in transformer.parameters() if parameter.requires_grad]
    transformer.zero_grad()
    return gradients, calls


def test_gradients_and_what_is_computed_twice():
    transformer = tiny_transformer(num_layers=3).train()
    transformer.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj"]
    transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    results = {kind: step(transformer, kind) for kind in ("none", *CHECKPOINTING)}
    expected, plain = results["none"]
    for gradients, _ in results.values():
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    # Of each layer two: to the video and to the text.
    attention = {kind: calls.attention for kind, (_, calls) in results.items()}
    assert attention == {"none": 6, "selective": 6, "full": 12}
    assert results["selective"][1].products == results["full"][1].products > plain.products


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_text_attention_is_checkpointed_too(kind):
    """Its projections of the text, of which the cache keeps nothing under grad."""
    transformer = tiny_transformer(num_layers=1).train()
    gradients, _ = step(transformer, kind)
    expected, _ = step(transformer, "none")
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients, expected, strict=True))
