"""Random numbers that belong to a sample, not to the process or the batch that makes it."""

import hashlib

import torch


def stable_seed(*key: int | str) -> int:
    """A 63-bit seed from any key; the same in every process, run and Python version."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def seeded_generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by `key`: its numbers do not depend on the device they are moved to."""
    return torch.Generator("cpu").manual_seed(stable_seed(*key))
