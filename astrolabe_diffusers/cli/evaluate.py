"""`astrolabe evaluate`."""

from __future__ import annotations

from ..errors import exit_code
from ..evaluation.config import LoraEvaluationConfig
from .arguments import ArgumentParser
from .options import parse_fields


def run(argv: list[str] | None):
    parser = ArgumentParser(
        prog="astrolabe evaluate",
        description="Scores the videos of a causal video model with and without LoRAs, from the same seeds.",
    )
    config = LoraEvaluationConfig(**parse_fields(parser, LoraEvaluationConfig, argv))
    from ..evaluation.loras import evaluate_loras

    evaluate_loras(config)


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(argv))
