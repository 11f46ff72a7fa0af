"""Online reinforcement learning of causal video pipelines."""

from ..errors import UserError, exit_code
from .config import NFTConfig
from .trainer import NFTTrainer


__all__ = ["NFTConfig", "NFTTrainer", "UserError", "exit_code"]
