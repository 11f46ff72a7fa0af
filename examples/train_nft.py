"""Trains a LoRA of a causal video pipeline with NFT.

    accelerate launch examples/train_nft.py --config tiny_shapes [--any_field value]

`--help` lists the fields and the names of configurations.
"""

from __future__ import annotations

import sys

from astrolabe_diffusers.cli.train import parse_args
from astrolabe_diffusers.training import NFTTrainer, exit_code


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: NFTTrainer(config=parse_args(argv)).train())


if __name__ == "__main__":
    sys.exit(main())
