"""Rewards for generated videos. Importing this registers the built-in ones."""

from .reward import FunctionReward, Reward, RewardError, RewardOutput, get_reward, register_reward
from .reward_set import RewardSet, RewardSetOutput
from .tiny_shapes import TinyShapesPromptMatch
from .video_quality import Flicker, MotionSmoothness, Sharpness


__all__ = [
    "Flicker",
    "FunctionReward",
    "MotionSmoothness",
    "Reward",
    "RewardError",
    "RewardOutput",
    "RewardSet",
    "RewardSetOutput",
    "Sharpness",
    "TinyShapesPromptMatch",
    "get_reward",
    "register_reward",
]
