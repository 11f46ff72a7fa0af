"""Rewards for generated videos. Importing this registers the built-in ones."""

from .aesthetic import Aesthetic
from .hpsv2 import HPSv2
from .hpsv3 import HPSv3
from .reward import FunctionReward, Reward, RewardError, RewardOutput, get_reward, register_reward
from .reward_set import RewardSet, RewardSetOutput
from .tiny_shapes import TinyShapesPromptMatch
from .video_quality import Flicker, MotionSmoothness, Sharpness
from .videoalign import VideoAlign


__all__ = [
    "Aesthetic",
    "Flicker",
    "FunctionReward",
    "HPSv2",
    "HPSv3",
    "MotionSmoothness",
    "Reward",
    "RewardError",
    "RewardOutput",
    "RewardSet",
    "RewardSetOutput",
    "Sharpness",
    "TinyShapesPromptMatch",
    "VideoAlign",
    "get_reward",
    "register_reward",
]
