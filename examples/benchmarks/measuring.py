"""Time and memory on this machine's GPU, if there is one."""

import time

import torch

from astrolabe_diffusers.reporting.machine import peak_memory_gb


def clock() -> float:
    """Now, in seconds, when the device has finished what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def forget_peak():
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def gpu_peak() -> float:
    """GB (1e9 bytes) since [`forget_peak`]."""
    return peak_memory_gb(torch.device("cuda")) if torch.cuda.is_available() else 0.0
