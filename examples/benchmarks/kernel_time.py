"""Where the time of the GPU goes, by kinds of kernels; on a CPU, that of torch's operators."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from measuring import clock
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


# The first that fits a kernel's name, in any case. Compiled ones are named after all that they do, and cuDNN's
# attention after convolutions, too. Of the compiler's templates none is used but flex attention.
KINDS = {
    "compiled": r"^triton(?!_tem|_flex)|compiled",
    "attention": r"^triton_tem|flash|fmha|sdpa|attention",
    "convolutions": r"conv|fprop|implicit_gemm",
    "products of matrices": r"gemm|gemv|nvjet|cutlass|splitk|::(mm|bmm|addmm|linear)\b",
    "copies": r"memcpy|memset|copy|cat|fill|nchwtonhwc|nhwctonchw|::(clone|zero_)",
    "other": "",
}


@dataclass
class KernelTime:
    ms: float = 0.0
    number: int = 0  # of launches


def kind_of(kernel: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE))


def kernel_times(steps: Iterator, number: int) -> dict[str, KernelTime]:
    """Of the last of `number` steps, by kind. An operator's time on a CPU is without that of those it calls."""
    for _ in range(number - 1):
        next(steps)
    clock()
    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        next(steps)
        clock()
    times = {kind: KernelTime() for kind in KINDS}
    if on_gpu:
        kernels = (
            (event.name, event.time_range.elapsed_us(), 1)
            for event in profiler.events()
            if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        )
    else:
        kernels = ((event.key, event.self_cpu_time_total, event.count) for event in profiler.key_averages())
    for name, microseconds, number in kernels:
        times[kind_of(name)].ms += microseconds / 1e3
        times[kind_of(name)].number += number
    return times
