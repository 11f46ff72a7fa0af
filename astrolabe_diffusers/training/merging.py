"""An adapter merged into the weights, for as long as videos are made with it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from ..models.lora_layers import tuner_layers


@contextmanager
def merged_weights(transformer: nn.Module, adapter: str) -> Iterator[None]:
    """Inside, the layers with this LoRA have `W + scaling B A` in the place of their weights, and biases likewise, in
    the dtype that they have; the adapters have to be disabled. Afterwards, come what may, the weights are the tensors
    that they were.

    Sums are in float32 and rounded once, at random ([`round_stochastically`]), always with the same random numbers:
    the merged weights depend on weights and LoRA alone, on every process and after every resuming. They take as much
    memory as the weights that they stand for.
    """
    generator = torch.Generator(transformer.device).manual_seed(0)
    before = []
    try:
        with torch.no_grad():
            for layer in tuner_layers(transformer):
                for parameter, change in _changes(layer, adapter):
                    before.append((parameter, parameter.data))
                    merged = parameter.data + change  # in the finer dtype of the two: a policy's LoRA is float32
                    if merged.dtype != parameter.dtype:
                        merged = round_stochastically(merged, parameter.dtype, generator)
                    parameter.data = merged
        yield
    finally:
        for parameter, data in before:
            parameter.data = data


def _changes(layer: LoraLayer, adapter: str) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """The parameters of a layer that an adapter adds to, and what it adds."""
    if adapter in layer.lora_A:
        base = layer.get_base_layer()
        yield base.weight, layer.get_delta_weight(adapter)
        if layer.lora_bias[adapter]:
            yield base.bias, layer.scaling[adapter] * layer.lora_B[adapter].bias


def round_stochastically(x: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Float32 `x` in bfloat16: one of the two values around it, the nearer one more often, so that their
    mean is `x` (arXiv 2010.06192). What the dtype has stays as it is.

    To the nearest value would lose a young LoRA: a base's weight has one already, and leaves it only for a change of
    more than half the spacing, 0.2 to 0.4 % of the weight in bfloat16.
    """
    dropped = round(math.log2(torch.finfo(dtype).eps / torch.finfo(x.dtype).eps))  # bits of the fraction
    bits = x.view(torch.int32)
    noise = torch.randint(1 << dropped, x.shape, generator=generator, dtype=torch.int32, device=x.device)
    rounded = ((bits + noise) & -(1 << dropped)).view(x.dtype)
    # Of some NaNs the sum of bits is a number.
    return torch.where(x.isfinite(), rounded, x).to(dtype)
