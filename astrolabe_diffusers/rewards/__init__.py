"""Rewards for generated videos. Importing this registers the built-in ones."""

from .frames import FrameRequest, prepare_frames
from .metrics.brisque import Brisque
from .metrics.dynamic_degree import DynamicDegree
from .metrics.tiny_shapes import TinyShapesPromptMatch
from .metrics.video_quality import Flicker, MotionSmoothness, Sharpness
from .models.aesthetic import Aesthetic
from .models.hpsv2 import HPSv2
from .models.hpsv3 import HPSv3
from .models.judge import UnifiedReward
from .models.videoalign import VideoAlign
from .registry import get_reward, named_reward_funcs, register_reward
from .reward import FunctionReward, Reward, RewardError, RewardOutput, RewardPlaceError
from .reward_set import RewardSet, RewardSetOutput


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
    "named_reward_funcs",
    "prepare_frames",
    "register_reward",
]
