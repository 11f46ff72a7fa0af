"""AWM, advantage-weighted matching (arXiv 2509.25050)."""

from .config import AWMConfig
from .trainer import AWMTrainer


__all__ = ["AWMConfig", "AWMTrainer"]
