"""What each of two processes does for test_batch_size.py, of which the second has less memory; started by torchrun."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from astrolabe_diffusers.cli.train import parse_args
from astrolabe_diffusers.training import NFTTrainer, batch_size
from tests.training.memory import limit_batches


def main(folder: Path, arguments: list[str]):
    rank = int(os.environ["RANK"])
    batch_size.says_when_memory_is_full = lambda device: True
    trainer = NFTTrainer(config=parse_args(arguments))
    sizes = limit_batches(trainer.transformer, limit=2 - rank)
    trainer.train()
    config = trainer.config
    found = config.train_batch_size, config.batches_per_epoch, config.gradient_accumulation_steps
    (folder / f"rank{rank}.json").write_text(json.dumps({"found": found, "tried": sorted(sizes)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
