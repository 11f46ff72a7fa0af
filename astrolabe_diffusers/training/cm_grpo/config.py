"""Settings of CM-GRPO."""

from dataclasses import dataclass

from ...config import option, with_default
from ...errors import UserError
from ..config import OnlineConfig
from ..forward_process.config import BlockwiseConfig


@dataclass
class CMGRPOConfig(BlockwiseConfig):
    """Settings of a run with CM-GRPO, beside those of [`OnlineConfig`] and [`BlockwiseConfig`]."""

    algorithm = "CM-GRPO"
    paper = "https://arxiv.org/abs/2605.15190"

    output_dir: str = option("cm-grpo-lora", "everything the run writes")
    reward_normalization: str = with_default(OnlineConfig, "reward_normalization", "group")
    advantage_std: str = with_default(OnlineConfig, "advantage_std", "group")
    kl_weight: float = with_default(BlockwiseConfig, "kl_weight", 0.0)
    block_weighting: str = option(
        "late",
        "how much the blocks of the window count, 1 on average: block c of N, from 0, as 1 / (N - c); or "
        "all the same",
        choices=("late", "uniform"),
    )
    context: str = with_default(BlockwiseConfig, "context", "clean_grad")

    def __post_init__(self):
        super().__post_init__()
        if self.steps_per_epoch > 1:
            raise UserError(
                f"cm_grpo learns from what the current policy sampled: one optimizer step an epoch, not "
                f"{self.steps_per_epoch}; leave gradient_accumulation_steps out."
            )
