"""Importing this registers the built-in rewards."""

from .metrics import brisque, dynamic_degree, tiny_shapes, video_quality
from .models import aesthetic, hpsv2, hpsv3, judge, videoalign


__all__ = [
    "aesthetic",
    "brisque",
    "dynamic_degree",
    "hpsv2",
    "hpsv3",
    "judge",
    "tiny_shapes",
    "video_quality",
    "videoalign",
]
