"""Rewards for generated videos."""

from ..registration import lazy_names


__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        ".frames": ["FrameRequest", "prepare_frames"],
        ".metrics.brisque": ["Brisque"],
        ".metrics.dynamic_degree": ["DynamicDegree"],
        ".metrics.tiny_shapes": ["TinyShapesPromptMatch"],
        ".metrics.video_quality": ["Flicker", "MotionSmoothness", "Sharpness"],
        ".models.aesthetic": ["Aesthetic"],
        ".models.hpsv2": ["HPSv2"],
        ".models.hpsv3": ["HPSv3"],
        ".models.judge": ["UnifiedReward"],
        ".models.musiq": ["Musiq"],
        ".models.raft": ["RaftDynamicDegree"],
        ".models.videoalign": ["VideoAlign"],
        ".registry": ["get_reward", "named_reward_funcs", "register_reward"],
        ".reward": ["FunctionReward", "Reward", "RewardError", "RewardOutput", "RewardPlacementError"],
        ".reward_set": ["RewardSet", "RewardSetOutput"],
    },
)
