"""Many videos to a folder: jobs -> batches of every process -> MP4 files as they are generated -> a manifest."""

from .config import GenerationConfig, name_and_weight
from .run import generate_videos


__all__ = ["GenerationConfig", "generate_videos", "name_and_weight"]
