"""NFT, negative-aware fine-tuning on the forward process (Astrolabe, arXiv 2603.17051)."""

from ...registration import lazy_names


__getattr__, __dir__, __all__ = lazy_names(__name__, {".config": ["NFTConfig"], ".trainer": ["NFTTrainer"]})
