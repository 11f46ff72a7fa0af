"""Rewards for generated videos. Importing this registers the built-in ones."""

from .aesthetic import Aesthetic
from .brisque import Brisque
from .dynamic_degree import DynamicDegree
from .frame_request import FrameRequest, prepare_frames
from .hpsv2 import HPSv2
from .hpsv3 import HPSv3
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
from .videoalign import VideoAlign


__all__ = [
    "Aesthetic",
    "Brisque",
    "DynamicDegree",
    "Flicker",
    "FrameRequest",
    "FunctionReward",
    "HPSv2",
    "HPSv3",
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
    "VideoAlign",
    "get_reward",
    "prepare_frames",
    "register_reward",
]
