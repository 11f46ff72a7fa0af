"""One process of two that loads a pipeline to shard it, and the same whole; started by torchrun.

Then a policy is merged in both, and the shards are gathered for several passes.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from astrolabe_diffusers.distributed.sharding import full_tensor, gathered, shard
from astrolabe_diffusers.pipelines.loading import load_frozen_pipeline
from astrolabe_diffusers.training.checkpoints import policy_identity
from astrolabe_diffusers.training.policies import add_policies, policy_parameters, use_policy
from tests.training.test_policies import forward


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
    for parameter in policy_parameters(transformer, "old"):
        parameter.data.normal_(0, 0.1)
    return transformer


def weights(transformer: torch.nn.Module) -> dict[str, torch.Tensor]:
    named = transformer.named_parameters()
    return {name: full_tensor(weight.detach()).clone() for name, weight in named if ".lora_" not in name}


def merged_weights(transformer: torch.nn.Module) -> tuple[dict[str, torch.Tensor], bool]:
    """Weights as the old policy, and whether they are afterwards what they were."""
    before = weights(transformer)
    with use_policy(transformer, "old", merge=True):
        merged = weights(transformer)
    after = weights(transformer)
    return merged, all(torch.equal(after[name], weight) for name, weight in before.items())


def passes(transformer: torch.nn.Module, together: bool) -> tuple[list[torch.Tensor], list[bool]]:
    """What a pass of the old policy and one of the current give, and the gradient of that; and of every parameter
    whether it is in shards while they are made."""
    with gathered(transformer) if together else nullcontext():
        with use_policy(transformer, "old"):
            results = [forward(transformer)]
        results.append(forward(transformer))
        results[-1].square().mean().backward()
        in_shards = [isinstance(parameter, DTensor) for parameter in transformer.parameters()]
    results += [full_tensor(parameter.grad) for parameter in policy_parameters(transformer)]
    transformer.zero_grad()
    return [result.detach().clone() for result in results], in_shards


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
    local = sum(weight.to_local().nbytes for weight in shards.values())
    expected_merged, whole_is_back = merged_weights(whole)
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
        "local": local,
    }
    # Before FSDP has seen a pass, and after.
    for stage in ("early", "late"):
        merged, is_back = merged_weights(transformer)
        report[stage] = [torch.equal(merged[name], weight) for name, weight in expected_merged.items()]
        report["back"] = report.get("back", whole_is_back) and is_back
        apart, in_shards = passes(transformer, together=False)
        report["in_shards"] = report.get("in_shards", []) + in_shards
    base = weights(transformer)
    report["merged"] = sum(not torch.equal(base[name], weight) for name, weight in expected_merged.items())
    trainable = [parameter.requires_grad for parameter in transformer.parameters()]
    together, report["gathered"] = passes(transformer, together=True)
    report["passes"] = [torch.equal(a, b) for a, b in zip(apart, together, strict=True)]
    report["gradients"] = sum(bool(gradient.any()) for gradient in together[2:])
    report["trainable"] = trainable == [parameter.requires_grad for parameter in transformer.parameters()]
    report["again_in_shards"] = all(isinstance(parameter, DTensor) for parameter in transformer.parameters())
    (output / f"rank{accelerator.process_index}.json").write_text(json.dumps(report))
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
