"""Rewards for generated videos. Importing this registers the built-in ones."""

from .brisque import Brisque
from .dynamic_degree import DynamicDegree
from .frame_request import FrameRequest, prepare_frames
from .judge import UnifiedReward
from .reward import (
    FunctionReward,
    Reward,
    RewardError,
    RewardOutput,
    RewardPlaceError,
    get_reward,
    register_reward,
)
from .reward_set import RewardSet, RewardSetOutput
from .tiny_shapes import TinyShapesPromptMatch
from .video_quality import Flicker, MotionSmoothness, Sharpness


__all__ = [
    "Brisque",
    "DynamicDegree",
    "FrameRequest",
    "Flicker",
    "FunctionReward",
    "MotionSmoothness",
    "Reward",
    "RewardError",
    "RewardOutput",
    "RewardPlaceError",
    "RewardSet",
    "RewardSetOutput",
    "Sharpness",
    "TinyShapesPromptMatch",
    "UnifiedReward",
    "get_reward",
    "prepare_frames",
    "register_reward",
]
