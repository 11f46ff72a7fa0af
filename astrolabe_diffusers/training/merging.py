"""An adapter merged into the weights, for as long as videos are made with it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.tensor import DTensor

from ..distributed.sharding import full_tensor, keeps_gathered, local_part
from ..models.lora_layers import tuner_layers


@contextmanager
def merged_weights(transformer: nn.Module, adapter: str) -> Iterator[None]:
    """Inside, the layers with this LoRA have `W + scaling B A` in the place of their weights, and biases likewise, in
    the dtype that they have; the adapters have to be disabled. Afterwards, come what may, the weights are what they
    were, to the last bit.

    Sums are in float32 and rounded once, at random ([`round_stochastically`]), always with the same random numbers:
    the merged weights depend on weights and LoRA alone, on every process and after every resuming. They take as much
    memory as the weights that they stand for. Every process enters; in shards each merges its own part in place, and
    keeps what was there: on the CPU, or on the device if weights stay gathered.
    """
    generator = torch.Generator(transformer.device).manual_seed(0)
    before = []
    try:
        with torch.no_grad():
            for layer in tuner_layers(transformer):
                for parameter, change in _changes(layer, adapter):
                    merged = _added(parameter.data, change, generator)
                    before.append((parameter, _kept(parameter)))
                    _put(parameter, merged)
        yield
    finally:
        with torch.no_grad():
            for parameter, data in before:
                _put(parameter, data)


def _changes(layer: LoraLayer, adapter: str) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """The parameters of a layer that an adapter adds to, and what it adds, whole."""
    if adapter in layer.lora_A:
        base = layer.get_base_layer()
        with _whole(layer.lora_A[adapter]), _whole(layer.lora_B[adapter]):
            change = layer.get_delta_weight(adapter)
        yield base.weight, change
        if layer.lora_bias[adapter]:
            yield base.bias, layer.scaling[adapter] * full_tensor(layer.lora_B[adapter].bias)


@contextmanager
def _whole(module: nn.Module) -> Iterator[None]:
    """Inside, the weight of a module in shards is whole; every process enters."""
    weight = module.weight
    if isinstance(weight, DTensor):
        module.weight = nn.Parameter(weight.full_tensor(), requires_grad=False)
    try:
        yield
    finally:
        module.weight = weight


def _added(weight: torch.Tensor, change: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Their sum in the weight's dtype; of a weight in shards this process's part."""
    own = weight.to_local() if isinstance(weight, DTensor) else weight
    total = own + local_part(change, weight)  # in the finer dtype of the two: a policy's LoRA is float32
    if total.dtype == own.dtype:
        return total
    noise = rounding_noise(weight.shape, own.dtype, generator)
    return round_stochastically(total, own.dtype, local_part(noise, weight))


def _kept(parameter: nn.Parameter) -> torch.Tensor:
    """What a parameter has, of one in shards this process's part, while something else is put in its place."""
    if not isinstance(parameter.data, DTensor):
        return parameter.data
    # Where weights are gathered for every pass memory is short.
    local = parameter.data.to_local()
    return local.to(local.device if keeps_gathered() else "cpu", copy=True)


def _put(parameter: nn.Parameter, data: torch.Tensor):
    if isinstance(parameter.data, DTensor):
        # In place, for FSDP gathers from the memory that it knows.
        parameter.data.to_local().copy_(data)
    else:
        parameter.data = data


def rounding_noise(shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Random int32 numbers of as many bits as a float32 number has more than one of this dtype."""
    bits = _dropped_bits(dtype)
    return torch.randint(1 << bits, shape, generator=generator, dtype=torch.int32, device=generator.device)


def round_stochastically(x: torch.Tensor, dtype: torch.dtype, noise: torch.Tensor) -> torch.Tensor:
    """Float32 `x` in bfloat16: one of the two values around it, the nearer one more often, so that their
    mean is `x` (arXiv 2010.06192). What the dtype has stays as it is.

    To the nearest value would lose a young LoRA: a base's weight has one already, and leaves it only for a change of
    more than half the spacing, 0.2 to 0.4 % of the weight in bfloat16.

    Args:
        noise: [`rounding_noise`] of its shape.
    """
    rounded = ((x.view(torch.int32) + noise) & -(1 << _dropped_bits(dtype))).view(x.dtype)
    # Of some NaNs the sum of bits is a number.
    return torch.where(x.isfinite(), rounded, x).to(dtype)


def _dropped_bits(dtype: torch.dtype) -> int:
    """Of float32's fraction, those that this dtype has not."""
    return round(math.log2(torch.finfo(dtype).eps / torch.finfo(torch.float32).eps))
