"""The command line of an evaluation."""

from __future__ import annotations

from ..evaluation.loras import LoraEvaluationConfig
from .arguments import ArgumentParser
from .options import parse_fields


def parse_evaluation_args(argv: list[str] | None = None) -> LoraEvaluationConfig:
    """Settings from `--any_field value`; `argv` are the arguments, those of the process if `None`."""
    parser = ArgumentParser(
        description="Scores the videos of a causal video model with and without LoRAs, from the same seeds."
    )
    return LoraEvaluationConfig(**parse_fields(parser, LoraEvaluationConfig, argv))
