"""Online reinforcement learning of causal video pipelines."""

from ..registration import lazy_names


__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "..errors": ["UserError", "exit_code"],
        ".algorithms": ["get_algorithm"],
        ".callbacks": ["TrainerCallback"],
        ".config": ["OnlineConfig"],
        ".nft": ["NFTConfig", "NFTTrainer"],
        ".trainer": ["OnlineTrainer"],
    },
)
