"""CM-GRPO, the policy gradient of the sampler's own consistency steps (RAVEN, arXiv 2605.15190)."""

from ...registration import lazy_names


__getattr__, __dir__, __all__ = lazy_names(__name__, {".config": ["CMGRPOConfig"], ".trainer": ["CMGRPOTrainer"]})
