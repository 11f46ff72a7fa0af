"""Many videos to a folder: jobs -> batches of every process -> MP4 files as they are generated -> a manifest."""

from .config import GenerationConfig, name_and_weight
from .run import generate_videos
from .score_videos import ScoreConfig, score_videos


__all__ = ["GenerationConfig", "ScoreConfig", "generate_videos", "name_and_weight", "score_videos"]
