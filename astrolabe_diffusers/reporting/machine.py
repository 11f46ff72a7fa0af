"""What computed a figure."""

import platform
import sys
from importlib.metadata import version

import psutil
import torch

from .. import __version__


try:
    import resource
except ImportError:  # on Windows
    resource = None


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process on a CUDA device, else its peak resident memory; GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if resource is None:
        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss) / 1e9
    # Linux counts in KB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " CPU"


def versions() -> dict[str, str]:
    """Of this package and those that figures depend on."""
    packages = ("torch", "diffusers", "transformers", "accelerate", "peft")
    own = {"astrolabe_diffusers": __version__, "python": platform.python_version()}
    return own | {package: version(package) for package in packages}
