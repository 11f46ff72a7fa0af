"""Trains a LoRA of a causal video pipeline: `astrolabe train` for `accelerate launch`.

    accelerate launch examples/train_nft.py --config tiny_shapes [--any_field value]

`--help` lists the fields and the names of configurations.
"""

from astrolabe_diffusers.cli.train import main


if __name__ == "__main__":
    raise SystemExit(main())
