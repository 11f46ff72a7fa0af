"""`astrolabe evaluate`."""

from ..evaluation.config import LoraEvaluationConfig
from .arguments import ArgumentParser, command
from .options import parse_fields


@command
def main(argv: list[str] | None):
    parser = ArgumentParser(
        prog="astrolabe evaluate",
        description="Scores the videos of a causal video model with and without LoRAs, from the same seeds.",
    )
    config = LoraEvaluationConfig(**parse_fields(parser, LoraEvaluationConfig, argv))
    from ..evaluation.loras import evaluate_loras

    evaluate_loras(config)
