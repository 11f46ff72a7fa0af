"""One process of a run of examples/train_nft.py that says how its weights lie; started by torchrun."""

import json
import sys
from pathlib import Path

from torch.distributed.tensor import DTensor

from astrolabe_diffusers.cli.train import parse_args
from astrolabe_diffusers.training import NFTTrainer


def main(argv: list[str]):
    trainer = NFTTrainer(config=parse_args(argv))
    weights = dict(trainer.transformer.named_parameters())
    sharded = [name for name, weight in weights.items() if isinstance(weight, DTensor)]
    local = sum(w.to_local().numel() if isinstance(w, DTensor) else w.numel() for w in weights.values())
    accumulate, gathered, whole_gradients = trainer.accumulate_gradients, set(), set()

    def watch(*args):
        parameters = list(trainer.transformer.parameters())
        gathered.update(not isinstance(parameter, DTensor) for parameter in parameters)
        sums = accumulate(*args)
        whole_gradients.update(parameter.grad is not None for parameter in parameters)
        return sums

    trainer.accumulate_gradients = watch
    trainer.train()
    report = {
        "gathered": sorted(gathered),
        "whole_gradients": sorted(whole_gradients),
        "world_size": trainer.accelerator.num_processes,
        "sharded": len(sharded) / len(weights),
        "meshes": sorted({str(weights[name].device_mesh.shape) for name in sharded}),
        "adapters": sorted({name.split(".")[-2] for name in sharded if ".lora_" in name}),
        "local": local / sum(weight.numel() for weight in weights.values()),
    }
    name = f"rank{trainer.accelerator.process_index}.json"
    Path(trainer.config.output_dir, name).write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
