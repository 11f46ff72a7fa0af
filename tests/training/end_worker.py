"""What each of two processes does for test_distributed.py's run to the end; started by torchrun."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from astrolabe_diffusers.cli.train import parse_args
from astrolabe_diffusers.training import NFTTrainer


def main(folder: Path, arguments: list[str]):
    alive, destroy = [], torch.distributed.destroy_process_group

    def note_and_destroy(group=None):
        alive.append(sum(isinstance(item, DistributedDataParallel) for item in gc.get_objects()))
        destroy(group)

    torch.distributed.destroy_process_group = note_and_destroy
    trainer = NFTTrainer(config=parse_args(arguments))
    wrapped = isinstance(trainer.model, DistributedDataParallel)
    trainer.train()
    (folder / f"rank{trainer.accelerator.process_index}.json").write_text(json.dumps([wrapped, alive]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
