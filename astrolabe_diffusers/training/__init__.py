"""Online reinforcement learning of causal video pipelines, and the evaluation of its results."""

from .config import NFTConfig, parse_args
from .errors import UserError, exit_code
from .lora_evaluation import LoraEvaluationConfig, evaluate_loras, parse_evaluation_args
from .trainer import NFTTrainer


__all__ = [
    "LoraEvaluationConfig",
    "NFTConfig",
    "NFTTrainer",
    "UserError",
    "evaluate_loras",
    "exit_code",
    "parse_args",
    "parse_evaluation_args",
]
