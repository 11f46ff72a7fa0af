"""The transformer in shards over the processes (torch's FSDP2), for models that one device does not hold."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import str_to_bool
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from .agreement import is_first_process, raise_together


def is_sharded() -> bool:
    """Whether the run was launched with an FSDP config of accelerate.

    From the environment, for accelerate itself ignores it on a CPU, where torch's FSDP2 works as on a GPU.
    """
    return bool(str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")))


def shard(transformer: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Shards a transformer with its adapters in place, block by block, over processes that hold the same weights.

    Not by `Accelerator.prepare`: it would cast what a block is given, the rotary tables too, to bf16, and write the
    frozen base into every checkpoint. Weights keep their dtype; in bf16 runs the forward pass is under autocast, as
    accelerate has it for a model that is not sharded.
    """
    device = accelerator.device.type
    mesh = init_device_mesh(device, (accelerator.num_processes,))
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    blocks = [block for block in transformer.modules() if type(block).__name__ in transformer._repeated_blocks]
    for module in (*blocks, transformer):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    if accelerator.mixed_precision == "bf16":
        transformer.forward = torch.autocast(device, torch.bfloat16)(transformer.forward)
    return transformer


def together() -> AbstractContextManager:
    """[`raise_together`] for what processes do with their weights. In shards they wait inside for each other: there an
    error must end its process at once."""
    return nullcontext() if is_sharded() else raise_together()


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor; every process asks for it if it is in shards."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tensors on the CPU for the first process, none for others; every process asks for them."""
    whole = ((name, full_tensor(tensor)) for name, tensor in tensors.items())
    return {name: tensor.cpu() for name, tensor in whole if is_first_process()}


def shard_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor in the shards of another, if that has any."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
