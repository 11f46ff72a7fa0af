"""Triton kernels of our own beside plain functions that say what they compute: each is checked at its first use."""

import logging
from collections.abc import Callable
from functools import wraps
from importlib import import_module

import torch


logger = logging.getLogger(__name__)

# Of a kernel's result from the plain one, at its first use, as a share of the largest value. The plain one rounds more
# often. Frames of uint8 have to be equal.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.uint8: 1e-3}


def on_gpu(x: torch.Tensor) -> bool:
    return x.device.type == "cuda"


def with_kernel(module: str) -> Callable[[Callable], Callable]:
    """On CUDA, the kernel of the same name in that module beside this one, once it has given what the plain function
    gives: for each dtype, and for each choice of what may be missing. One that fails is not tried again. Where
    gradients are wanted, and under torch.compile, it is the plain function."""

    def decorate(plain: Callable) -> Callable:
        trusted, failed = set(), False

        @wraps(plain)
        def run(x: torch.Tensor, *args):
            nonlocal failed
            if torch.compiler.is_compiling() or failed or not on_gpu(x) or x.dtype not in TOLERANCES:
                return plain(x, *args)
            if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in (x, *args)):
                return plain(x, *args)
            variant = x.dtype, *(arg if isinstance(arg, int) else arg is None for arg in args)
            if variant not in trusted:
                if not _agrees(plain, module, x, *args):
                    failed = True
                    return plain(x, *args)
                trusted.add(variant)
            with torch.cuda.device_of(x):
                return _kernel(plain, module)(x, *args)

        return run

    return decorate


def _kernel(plain: Callable, module: str) -> Callable:
    # Triton is imported with it, which is there where CUDA is.
    return getattr(import_module(f"{__package__}.{module}"), plain.__name__)


def _agrees(plain: Callable, module: str, x: torch.Tensor, *args) -> bool:
    # A few rows tell as much as the frame, without its memory.
    x, *args = (arg[:, :, :4] if isinstance(arg, torch.Tensor) and arg.ndim == 5 else arg for arg in (x, *args))
    try:
        with torch.cuda.device_of(x):
            results = _kernel(plain, module)(x.clone(), *args)
        # Copies, as `add` writes into what it is given.
        expected = plain(x.clone(), *args)
        pairs = [(results, expected)] if isinstance(expected, torch.Tensor) else zip(results, expected)
        difference = max(_difference(*pair) for pair in pairs if pair[1] is not None)
        problem = None if difference <= 1 else f"its result is off by {difference:.3g} times the tolerance"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler that is missing or too old raises
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        logger.warning("`%s` runs without its own kernel, slower: %s", plain.__name__, problem)
    return problem is None


def _difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, in units of the tolerance. NaN and infinite values are the model's own, and say nothing."""
    tolerance = TOLERANCES[expected.dtype]
    result, expected = (tensor.float().nan_to_num(0, 0, 0) for tensor in (result, expected))
    largest = expected.abs().max().clamp(min=1e-30)
    return ((result - expected).abs().max() / largest / tolerance).item()
