"""Settings of how rewards are scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..config import Config, option
from ..errors import as_user_error


if TYPE_CHECKING:
    from .reward_set import RewardSet


PLACEMENTS = (
    "'trainer', 'offload', a device such as 'cuda:1', 'process', 'process:cuda:1' or 'http://host:port'; of several, "
    "'process:cuda:6|process:cuda:7', each training process takes one in turn"
)


@dataclass
class RewardConfig(Config):
    """How rewards are scored."""

    reward_options: dict[str, dict[str, Any]] = option(
        {}, "arguments of rewards: name.argument=value,name.argument=value; in YAML {name: {argument: value}}"
    )
    reward_placement: dict[str, str] = option({}, f"where rewards are scored, name=place: {PLACEMENTS}")
    reward_timeout: float = option(
        600, "seconds after which a batch's rewards count as hung, wherever they are, and the run ends", minimum=1e-3
    )

    def make_rewards(self, weights: dict[str, float], fps: float, process_index: int = 0) -> RewardSet:
        """Rewards with these weights, for videos of `fps` frames a second."""
        from .reward_set import RewardSet

        with as_user_error("rewards"):
            return RewardSet(
                weights, self.reward_options, self.reward_placement, self.reward_timeout, fps, process_index
            )
