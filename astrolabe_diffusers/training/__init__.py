"""Online reinforcement learning of causal video pipelines."""

from ..errors import UserError, exit_code
from .algorithms import get_algorithm
from .callbacks import TrainerCallback
from .config import OnlineConfig
from .nft import NFTConfig, NFTTrainer
from .trainer import OnlineTrainer


__all__ = [
    "NFTConfig",
    "NFTTrainer",
    "OnlineConfig",
    "OnlineTrainer",
    "TrainerCallback",
    "UserError",
    "exit_code",
    "get_algorithm",
]
