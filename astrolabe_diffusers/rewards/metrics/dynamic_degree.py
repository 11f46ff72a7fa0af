"""How much moves in a video."""

import torch

from ..frames import FrameRequest, FrameSelection
from ..registry import register_reward
from ..reward import Reward, RewardOutput
from .video_quality import luminance


# The short side of the frames that are compared, their windows and the step from one window to the next, in pixels.
_SIDE, _WINDOW, _STEP = 128, 32, 16


@register_reward("dynamic_degree")
class DynamicDegree(Reward):
    """
    How fast the fastest parts of the picture move, by phase correlation: without weights what VBench, which takes the
    optical flow of RAFT, calls so.

    Frames are brought to 128 pixels along the short side; every window of 32 pixels of the luminance, half
    overlapping, is compared with the same window of the next frame, and the peak of their phase correlation is how far
    it moved. A peak below 5 deviations is no motion, one above 8 counts in full: plain areas and a change of light do
    not count, and noise hardly. As in VBench, the mean over the fastest 5 % of the windows is the motion of a pair of
    frames.

    The score is the mean over all pairs in short sides a second of the video, which has `fps` frames: 0 if it is
    still, and 1/8 of the short side a frame at most (2 at 16 frames a second); what is faster than that is not seen,
    and what moves over a detailed background is seen in part. `above_threshold` in the info is the share of pairs that
    move faster than 0.1875 short sides a second, VBench's limit of what is dynamic (6 of 256 pixels in an eighth of a
    second). It rewards any motion, that of the camera and of artefacts too. 81 frames of 480x832 take about 10 s on
    one CPU core, most of it for making them small.
    """

    uses_prompt = False

    def __init__(self, fps: float = 16.0):
        self.select = FrameSelection("all", fps)

    def request(self, num_frames, height, width):
        scale = _SIDE / min(height, width)
        return FrameRequest(tuple(self.select(num_frames)), ((round(height * scale), round(width * scale)),))

    def score(self, videos, prompts, metadata=None):
        frames = self.requested(videos)
        if frames.shape[1] == 1:
            return RewardOutput(torch.zeros(len(frames)), {"above_threshold": torch.zeros(len(frames))})
        speed = torch.stack([_motion(luminance(video) / 255) for video in frames]) * (self.select.fps / _SIDE)
        return RewardOutput(speed.mean(1).cpu(), {"above_threshold": (speed > 6 / 256 * 8).float().mean(1).cpu()})


def _motion(frames: torch.Tensor) -> torch.Tensor:
    """[F - 1]: pixels that the fastest windows of frames [F, H, W] move from each frame to the next."""
    windows = frames.unfold(1, _WINDOW, _STEP).unfold(2, _WINDOW, _STEP).flatten(1, 2)
    hann = torch.hann_window(_WINDOW, periodic=False, device=frames.device)
    windows = (windows - windows.mean((2, 3), keepdim=True)) * (hann[:, None] * hann)
    spectrum = torch.fft.rfft2(windows)
    cross = spectrum[1:] * spectrum[:-1].conj()
    # The floor, 1/100 of a gray level in every pixel, keeps rounding out of plain windows.
    power = cross.abs() + (_WINDOW**2 / 25500) ** 2
    correlation = torch.fft.irfft2(cross / power, s=(_WINDOW, _WINDOW))
    peak, position = correlation.flatten(2).max(2)
    # What the correlation of unrelated windows has as its deviation.
    deviation = (torch.fft.irfft2(cross.abs() / power, s=(_WINDOW, _WINDOW)).square().sum((2, 3)).sqrt()) / _WINDOW
    row, column = position // _WINDOW, position % _WINDOW
    distance = torch.stack([_refine(correlation, row, column, d) for d in ((1, 0), (0, 1))]).norm(dim=0)
    # Where neither frame has anything, or what they have does not fit, there is no motion.
    distance = distance.clamp(max=_WINDOW // 2) * ((peak / deviation.clamp(min=1e-3) - 5) / 3).clamp(0, 1)
    count = max(1, round(0.05 * distance.shape[1]))
    return distance.topk(count, dim=1).values.mean(1)


def _refine(correlation: torch.Tensor, row: torch.Tensor, column: torch.Tensor, axis: tuple[int, int]) -> torch.Tensor:
    """[..., N]: the place of the peak along an axis in pixels, by the parabola through it and its two neighbours."""

    def at(step):
        index = (row + step * axis[0]) % _WINDOW * _WINDOW + (column + step * axis[1]) % _WINDOW
        return correlation.flatten(2).gather(2, index[..., None])[..., 0]

    before, peak, after = at(-1), at(0), at(1)
    offset = (before - after) / (2 * (before - 2 * peak + after)).clamp(max=-1e-6)
    whole = row * axis[0] + column * axis[1]
    return (whole + _WINDOW // 2) % _WINDOW - _WINDOW // 2 + offset.clamp(-0.5, 0.5)
