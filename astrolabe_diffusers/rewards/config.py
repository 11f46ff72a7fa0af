"""Settings of how rewards are scored."""

from collections.abc import Collection
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

    def make_rewards(
        self,
        weights: dict[str, float],
        fps: float,
        process_index: int = 0,
        named: dict[str, Any] | None = None,
        others: Collection[str] = (),
        field: str = "rewards",
    ) -> "RewardSet":
        """Rewards with these weights, for videos of `fps` frames a second; `named` says what some of the names mean.
        The settings may speak of `others`, those of another set; `field` is the one that has the names."""
        from .reward_set import RewardSet

        settings = (self.reward_options, self.reward_placement)
        options, placement = ({name: s[name] for name in s if name not in others} for s in settings)
        with as_user_error(field):
            return RewardSet(weights, options, placement, self.reward_timeout, fps, process_index, named)
