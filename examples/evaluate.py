"""Scores and shows the videos of a causal video model with and without LoRAs, from the same seeds.

    accelerate launch examples/evaluate.py --lora FOLDER_OR_HUB_ID [--lora NAME=ANOTHER] [--any_field value]

`--help` lists the fields.
"""

from __future__ import annotations

import sys

from astrolabe_diffusers.cli.evaluate import parse_evaluation_args
from astrolabe_diffusers.evaluation.loras import evaluate_loras
from astrolabe_diffusers.training import exit_code


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: evaluate_loras(parse_evaluation_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
