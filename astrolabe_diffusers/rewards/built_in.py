"""Importing this registers the built-in rewards."""

from .metrics import brisque, dynamic_degree, hard_cut, tiny_shapes, video_quality  # noqa: F401
from .models import aesthetic, hpsv2, hpsv3, judge, musiq, raft, videoalign  # noqa: F401
