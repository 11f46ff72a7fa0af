"""The transformer in shards over the processes (torch's FSDP2), for models that one device does not hold."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import ParallelismConfig, gather_object, str_to_bool
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..errors import UserError
from .agreement import is_first_process, raise_together, tell_if_alone


# Of accelerate's dimensions those that data-parallel processes can have, with its names.
REPLICATE, SHARD = "dp_replicate", "dp_shard"


def is_sharded() -> bool:
    """Whether the run was launched with an FSDP config of accelerate.

    From the environment, for accelerate itself ignores it on a CPU, where torch's FSDP2 works as on a GPU.
    """
    return bool(str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")))


def keeps_gathered() -> bool:
    """Whether weights that were gathered for a pass stay for those that follow: accelerate's
    `fsdp_reshard_after_forward: false`, from the environment for the same reason."""
    return is_sharded() and not str_to_bool(os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true"))


def check_sharding_settings():
    """A [`UserError`] if accelerate's are those of FSDP1."""
    version, resharding = (os.environ.get(name) for name in ("FSDP_VERSION", "FSDP_RESHARD_AFTER_FORWARD"))
    if is_sharded() and (version != "2" or (resharding or "true").lower() not in ("true", "false")):
        raise UserError(
            "shards are FSDP2's: accelerate's fsdp_config needs fsdp_version: 2, and fsdp_reshard_after_forward must "
            f"be true or false; they are {version} and {resharding}."
        )


def left_in_file(tensor: torch.Tensor, dtype: torch.dtype) -> nn.Parameter:
    """A parameter of this dtype, without memory and of NaNs, that stands for a tensor on a file's memory map until
    [`shard`] reads this process's part."""
    parameter = nn.Parameter(torch.full((), torch.nan, dtype=dtype).expand(tensor.shape))
    parameter.in_file = tensor
    return parameter


def whole_weight(parameter: nn.Parameter) -> torch.Tensor:
    """The values of a parameter before it is sharded, in a file's dtype if they are [`left_in_file`]."""
    return getattr(parameter, "in_file", parameter.detach())


def shard(transformer: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Shards a transformer with its adapters in place, block by block, over processes that hold the same weights, or
    have left them in the same files.

    A process brings its own part of every weight to the device, and of one in a file it reads no more.

    Not by `Accelerator.prepare`: it would cast what a block is given, the rotary tables too, to bf16, and write the
    frozen base into every checkpoint; and with `cpu_ram_efficient_loading` one process holds the whole model. Weights
    keep their dtype; in bf16 runs the forward pass is under autocast, as accelerate has it for a model that is not
    sharded.
    """
    device = accelerator.device.type
    mesh = make_mesh(accelerator)
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    parameters = dict(transformer.named_parameters())
    # On the meta device, for FSDP2 would first bring whole weights to the device.
    shapes = {name: torch.empty(p.shape, dtype=p.dtype, device="meta") for name, p in parameters.items()}
    transformer.load_state_dict(shapes, strict=False, assign=True)
    blocks = [block for block in transformer.modules() if type(block).__name__ in transformer._repeated_blocks]
    for module in (*blocks, transformer):
        # Outside of passes all weights are in shards, except inside `gathered`; by default a root keeps its own whole.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # `pop`: a weight that is in memory goes when its shard is there.
    shards = {name: shard_like(whole_weight(parameters.pop(name)), p) for name, p in transformer.named_parameters()}
    transformer.load_state_dict(shards, strict=False, assign=True)
    if accelerator.mixed_precision == "bf16":
        transformer.forward = torch.autocast(device, torch.bfloat16)(transformer.forward)
    return transformer


def make_mesh(accelerator: Accelerator) -> DeviceMesh:
    """The processes in groups with a whole model each, in shards; every process calls it."""
    number = accelerator.num_processes
    local_sizes = gather_object([int(os.environ.get("LOCAL_WORLD_SIZE", number))])
    replicas, shards = mesh_sizes(local_sizes, accelerator.parallelism_config)
    sizes = {REPLICATE: replicas, SHARD: shards} if replicas > 1 else {SHARD: shards}
    return init_device_mesh(accelerator.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def mesh_sizes(local_sizes: list[int], parallelism: ParallelismConfig | None = None) -> tuple[int, int]:
    """How many replicas of the model there are, and in how many shards each is.

    It is what accelerate's `parallelism_config` says. Without one every machine has a replica: each pass gathers all
    weights, which is slow between machines.

    Args:
        local_sizes: of every process, how many there are on its machine.

    Raises:
        UserError: machines of different sizes, or dimensions that are not data-parallel.
    """
    number = len(local_sizes)
    if parallelism is None:
        if len(set(local_sizes)) > 1:
            raise UserError(
                f"machines have {min(local_sizes)} to {max(local_sizes)} processes: each holds a model, so they must "
                f"have equally many, unless accelerate's parallelism_config has {REPLICATE}_size and {SHARD}_size."
            )
        return number // local_sizes[0], local_sizes[0]
    sizes = parallelism.dp_replicate_size, parallelism.dp_shard_size
    if sizes[0] * sizes[1] != number:
        raise UserError(
            f"accelerate's parallelism_config has {REPLICATE}_size={sizes[0]} and {SHARD}_size={sizes[1]}, whose "
            f"product must be the {number} processes: there is no other parallelism here."
        )
    return sizes


@contextmanager
def gathered(transformer: nn.Module) -> Iterator[None]:
    """Inside, all weights of a sharded transformer are whole: passes, which must not change them, gather nothing.
    Gradients are of shards, and so are parameters before and after it. Not inside itself: the inner one ends both."""
    modules = [module for module in transformer.modules() if isinstance(module, FSDPModule)]

    def set_resharding(whether: bool):
        transformer.set_reshard_after_forward(whether)
        transformer.set_reshard_after_backward(whether)

    try:
        # First: peft sets `requires_grad` of the parameters that a module has at the time.
        for module in modules:
            module.unshard()
        set_resharding(False)
        yield
    finally:
        set_resharding(True)
        for module in modules:
            module.reshard()


@contextmanager
def no_sync(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Inside, gradients are added up on each process, to be averaged over all by the pass after it.

    In shards each process adds up its own part of them: whole ones would take as much memory as a LoRA does on one
    device. Only between replicas of the model nothing is sent. Not inside itself: the inner one ends both.
    """
    if not is_sharded():
        with accelerator.no_sync(model):
            yield
        return
    model.set_requires_all_reduce(False)
    try:
        yield
    finally:
        model.set_requires_all_reduce(True)


def together() -> AbstractContextManager:
    """[`raise_together`] for what processes do with their weights. In shards they wait inside for each other: there an
    error must end its process at once, but for those [`between_passes`]."""
    return tell_if_alone() if is_sharded() else raise_together()


def between_passes() -> AbstractContextManager:
    """Inside [`together`], for what a process does between two forward passes that all make equally many of: in shards
    an error is raised in every process before one of them waits for the others in its next pass."""
    return raise_together() if is_sharded() else nullcontext()


def passes_are_due(here: bool) -> bool:
    """Whether this process makes forward passes that it may or may not need: in shards also if another does `here`.
    Every process asks."""
    return any(gather_object([here])) if is_sharded() else here


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor; every process asks for it if it is in shards."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tensors on the CPU for the first process, none for others; every process asks for them."""
    whole = ((name, full_tensor(tensor)) for name, tensor in tensors.items())
    return {name: tensor.cpu() for name, tensor in whole if is_first_process()}


def shard_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, which every process has, in the shards of another, if that has any: this process's part, copied
    to the shards' device and in their dtype."""
    if not isinstance(like, DTensor):
        return tensor
    # The parts of other processes are not even read, where the tensor lies in a file.
    local = local_part(tensor, like).to(like.device_mesh.device_type, like.dtype, copy=True)
    layout = like.device_mesh, like.placements
    return DTensor.from_local(local, *layout, run_check=False, shape=like.shape, stride=like.stride())


def local_part(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Of a whole tensor the part that this process has of another one, all of it if that is not in shards."""
    if not isinstance(like, DTensor):
        return tensor
    layout = like.device_mesh, like.placements
    for dim, (size, start) in enumerate(zip(*compute_local_shape_and_global_offset(like.shape, *layout))):
        tensor = tensor.narrow(dim, start, size)
    return tensor
