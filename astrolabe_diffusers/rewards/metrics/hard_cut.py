"""Whether a video goes on from the frames before it."""

import torch
import torch.nn.functional as F

from ..frames import to_uint8
from ..registry import register_reward
from ..reward import Reward, RewardOutput


# Cells along the short side, which noise and the grain of a codec do not reach.
_CELLS = 32
# Mean change of a cell from frame to frame, of 1: less is no motion.
_STILL = 1e-3


@register_reward("hard_cut")
class HardCut(Reward):
    """
    A guard where a video is to go on after a change of its prompt: it neither jumps nor freezes.

    With d_t the mean absolute difference of two frames in turn, in cells of which the short side has 32,
    `jump` is the largest d_t over the median of all, the frames before the video included: steady motion has little
    more than 1, a cut several times more. `frozen` is the share of the video's steps with d_t below a tenth of the
    median before it, 0 if nothing moved there. The score is min(1, limit / jump) (1 - frozen), in [0, 1].

    A still video has 1 where all before it is still: it is no goal of its own. A cut cannot be told from a flash, nor
    from a prompt whose world is another one and appears at once.

    Args:
        limit: up to this a `jump` costs nothing.
    """

    uses_prompt = False
    num_context_frames = 8

    def __init__(self, limit: float = 3.0):
        if not limit >= 1:
            raise ValueError(f"limit must be at least 1, not {limit}: a jump is never smaller.")
        self.limit = limit

    def score(self, videos, prompts, metadata=None, *, context):
        frames = torch.cat([context, to_uint8(videos)], dim=1)
        if frames.shape[1] < 3:
            one = torch.ones(len(frames))
            return RewardOutput(one, {"jump": one, "frozen": one - 1})
        change = torch.stack([_changes(video) for video in frames])
        jump = change.amax(1) / change.median(1).values.clamp(min=_STILL)
        jump = jump.clamp(min=1)
        frozen = torch.zeros(len(frames), device=frames.device)
        if context.shape[1] > 2:
            before = change[:, : context.shape[1] - 1].median(1).values
            still = change[:, context.shape[1] - 1 :] < before[:, None] / 10
            frozen = still.float().mean(1) * (before >= _STILL)
        scores = (self.limit / jump).clamp(max=1) * (1 - frozen)
        return RewardOutput(scores.cpu(), {"jump": jump.cpu(), "frozen": frozen.cpu()})


def _changes(frames: torch.Tensor) -> torch.Tensor:
    """[F - 1] of frames [F, 3, H, W]."""
    size = max(1, min(frames.shape[-2:]) // _CELLS)
    cells = F.avg_pool2d(frames.float() / 255, size)
    return (cells[1:] - cells[:-1]).abs().mean((1, 2, 3))
