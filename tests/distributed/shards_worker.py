"""One process of two that loads a pipeline to shard it, and the same whole; started by torchrun."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from astrolabe_diffusers.distributed.sharding import full_tensor, shard
from astrolabe_diffusers.pipelines.loading import load_frozen_pipeline
from astrolabe_diffusers.training.checkpoints import policy_identity
from astrolabe_diffusers.training.policies import add_policies


@contextmanager
def peak_bytes() -> Iterator[list[int]]:
    """What torch has allocated in this process, at most, beyond what it had before; memory maps do not count."""
    peak = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield peak
    held = highest = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    peak.append(highest)


def load(folder: str, accelerator: Accelerator, to_shard: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    transformer = load_frozen_pipeline(folder, accelerator, to_shard=to_shard).transformer
    add_policies(transformer, rank=2, lora_alpha=4)
    return transformer


def main(folder: str, output: Path):
    accelerator = Accelerator(mixed_precision="bf16")
    with peak_bytes() as whole_peak:
        whole = load(folder, accelerator, to_shard=False)
    with peak_bytes() as peak:
        transformer = load(folder, accelerator, to_shard=True)
        identity = policy_identity(transformer)
        shard(transformer, accelerator)
    shards = dict(transformer.named_parameters())
    expected = dict(whole.named_parameters())
    other = [
        name
        for name, weight in expected.items()
        if not torch.equal(full_tensor(shards[name].detach()), weight)
        or (shards[name].dtype, shards[name].requires_grad) != (weight.dtype, weight.requires_grad)
    ]
    buffers = dict(transformer.named_buffers())
    same_buffers = [torch.equal(buffers[name], buffer) for name, buffer in whole.named_buffers()]
    sizes = {"whole": sum(w.nbytes for w in expected.values()), "largest": max(w.nbytes for w in expected.values())}
    dtypes = sorted({str(weight.dtype) for name, weight in expected.items() if ".lora_" not in name})
    same_identity = identity == policy_identity(whole)
    given = dict(shard(whole, accelerator).named_parameters())
    report = sizes | {
        "names": list(shards) == list(expected),
        "other": other,
        "dtypes": dtypes,
        "buffers": same_buffers,
        "identity": same_identity,
        "given": [torch.equal(given[name].to_local(), weight.to_local()) for name, weight in shards.items()],
        "sharded": all(isinstance(weight, DTensor) for weight in shards.values()),
        "peak": peak[0],
        "whole_peak": whole_peak[0],
        "local": sum(weight.to_local().nbytes for weight in shards.values()),
    }
    (output / f"rank{accelerator.process_index}.json").write_text(json.dumps(report))
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
