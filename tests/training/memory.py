"""Memory that a CPU does not have."""

from __future__ import annotations

import torch


def limit_batches(transformer: torch.nn.Module, limit: int) -> set[int]:
    """Makes passes of more than `limit` videos fail as on a GPU. Returns a set into which the sizes come."""
    sizes = set()

    def check(_, args):
        sizes.add(len(args[0]))
        if len(args[0]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    transformer.register_forward_pre_hook(check)
    return sizes
