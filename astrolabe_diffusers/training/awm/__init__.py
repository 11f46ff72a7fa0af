"""AWM, advantage-weighted matching (arXiv 2509.25050)."""

from ...registration import lazy_names


__getattr__, __dir__, __all__ = lazy_names(__name__, {".config": ["AWMConfig"], ".trainer": ["AWMTrainer"]})
