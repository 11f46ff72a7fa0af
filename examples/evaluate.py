"""Scores and shows the videos of a causal video model with and without LoRAs, from the same seeds.

    accelerate launch examples/evaluate.py --lora FOLDER_OR_HUB_ID [--column NAME=ANOTHER] [--any_field value]

`--help` lists the fields.
"""

from astrolabe_diffusers.cli.evaluate import main


if __name__ == "__main__":
    raise SystemExit(main())
