"""Online reinforcement learning of causal video pipelines."""

from .config import NFTConfig, parse_args
from .errors import UserError
from .trainer import NFTTrainer


__all__ = ["NFTConfig", "NFTTrainer", "UserError", "parse_args"]
