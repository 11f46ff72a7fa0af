"""NFT, negative-aware fine-tuning on the forward process (Astrolabe, arXiv 2603.17051)."""

from .config import NFTConfig
from .trainer import NFTTrainer


__all__ = ["NFTConfig", "NFTTrainer"]
