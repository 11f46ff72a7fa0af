"""Trains a LoRA of a causal video pipeline with NFT.

    accelerate launch examples/train_nft.py --config tiny_shapes [--any_field value]

`--help` lists the fields, `configs/` holds the named configurations.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from astrolabe_diffusers.training import NFTTrainer, UserError, parse_args


def main(argv: list[str] | None = None) -> int:
    try:
        NFTTrainer(parse_args(argv, config_dir=Path(__file__).parent / "configs")).train()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # the other processes would only say the same
            print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
