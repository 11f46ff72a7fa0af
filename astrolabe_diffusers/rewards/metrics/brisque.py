"""BRISQUE: how natural frames look, without anything to compare them with (Mittal et al., 2012)."""

import importlib.util
import io
import math
import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.special import gammaln

from ...errors import one_line
from ..frames import FrameRequest, FrameSelection
from ..registry import register_reward
from ..reward import Reward, RewardOutput


@register_reward("brisque")
class Brisque(Reward):
    """
    No-reference quality of the frames: 1 - BRISQUE / 100, about 1 for a natural picture and 0 for a badly distorted
    one; beyond both is possible.

    BRISQUE describes a frame by 36 statistics of its luminance, normalised by local mean and deviation, at two scales,
    and a support vector regression that was trained on people's judgements of blur, noise, compression and packet loss
    (the LIVE database) makes a number of them. It knows photographs: drawings are foreign to it, and it sees neither
    motion nor prompt. The score of a video is the mean over its frames. It works on the device of the videos; a frame
    of 480x832 takes about 0.3 s on one CPU core. Of the package `brisque` (Apache-2.0) two files with the weights are
    used and nothing else: `pip install --no-deps brisque` is enough.

    Args:
        frames, fps: which frames, see [`FrameSelection`], and the frames a second of the videos.
    """

    uses_prompt = False

    def __init__(self, frames: str = "all", fps: float = 16.0):
        self.select = FrameSelection(frames, fps)
        spec = importlib.util.find_spec("brisque")
        if spec is None:
            raise ImportError("the reward 'brisque' takes its weights from a package: pip install --no-deps brisque")
        folder = Path(spec.submodule_search_locations[0]) / "models"
        self.model = SupportVectorRegression(folder / "svm.txt", folder / "normalize.pickle")

    def request(self, num_frames, height, width):
        return FrameRequest(tuple(self.select(num_frames)))

    def score(self, videos, prompts, metadata=None):
        # Frame by frame: in float64 a whole video takes several GB.
        scores = [
            torch.stack([self.model(brisque_features(_gray(frame)))[0] for frame in video / 255]).mean()
            for video in self.requested(videos)
        ]
        return RewardOutput(1 - torch.stack(scores).float().cpu() / 100)


def _gray(frame: torch.Tensor) -> torch.Tensor:
    """[1, H, W] in float64 of a frame [3, H, W] in [0, 1]; the weights of Rec. 709, as scikit-image has them."""
    weights = frame.new_tensor([0.2125, 0.7154, 0.0721], dtype=torch.float64)
    return (weights @ frame.double().flatten(1)).view(1, *frame.shape[1:])


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, texts, lists and dicts. What names a class or a function, and might run it, is refused."""

    def find_class(self, module, name):
        raise ValueError(f"it names {module}.{name}, which would be run")


class SupportVectorRegression:
    """
    An RBF regression: f(x) = sum_i a_i exp(-g |x' - s_i|^2) - rho, with the features x scaled to x' in [-1, 1].

    `model` is a text file of libsvm with all s_i, a_i, g and rho; `ranges` is a pickle of the features that become
    -1 and 1, {"min_": [...], "max_": [...]}, of which no code is run.
    """

    def __init__(self, model: Path, ranges: Path):
        try:
            limits = _PlainUnpickler(io.BytesIO(ranges.read_bytes())).load()
            low, high = ([float(x) for x in limits[name]] for name in ("min_", "max_"))
        except (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError) as error:
            problem = f"{ranges} is no pickle of min_ and max_, two lists of numbers"
            raise ValueError(f"{problem}: {one_line(error)}") from None
        head, _, body = model.read_text().partition("SV\n")
        settings = dict(line.split(maxsplit=1) for line in head.splitlines())
        self.gamma, self.rho = float(settings["gamma"]), float(settings["rho"])
        rows = [line.split() for line in body.splitlines()]
        # Indices count from 1; those that are not there are 0.
        entries = [{int(k): float(v) for k, v in (item.split(":") for item in row[1:])} for row in rows]
        vectors = [[entry.get(i + 1, 0.0) for i in range(len(low))] for entry in entries]
        coefficients = [float(row[0]) for row in rows]
        self.tensors = [torch.tensor(x, dtype=torch.float64) for x in (vectors, coefficients, low, high)]

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """[B] of features [B, N]."""
        vectors, coefficients, low, high = (tensor.to(features.device) for tensor in self.tensors)
        scaled = 2 * (features.double() - low) / (high - low) - 1
        return torch.exp(-self.gamma * torch.cdist(scaled, vectors).square()) @ coefficients - self.rho


def brisque_features(gray: torch.Tensor) -> torch.Tensor:
    """[B, 36] of frames [B, H, W] in [0, 1], float64: at full and at half size shape and variance of the normalised
    luminance, and shape, mean and both variances of the products of neighbours in four directions."""
    features = []
    for size in (gray, F.interpolate(gray[:, None], scale_factor=0.5, mode="bicubic")[:, 0]):
        x = _normalized(size)
        shape, _, left, right = _fit(x)
        features += [shape, (left + right) / 2]
        features += _fit(x[:, :, :-1] * x[:, :, 1:])
        features += _fit(x[:, :-1] * x[:, 1:])
        features += _fit(x[:, :-1, :-1] * x[:, 1:, 1:])
        features += _fit(x[:, 1:, :-1] * x[:, :-1, 1:])
    return torch.stack(features, dim=1)


def _normalized(gray: torch.Tensor) -> torch.Tensor:
    """Luminance minus its local mean, over its local deviation: both under a Gaussian of 7x7 pixels."""
    offsets = torch.arange(-3, 4, dtype=gray.dtype, device=gray.device)
    kernel = torch.exp(-offsets.square() / (2 * (7 / 6) ** 2))
    kernel = kernel / kernel.sum()

    def blur(x):
        across = F.conv2d(x[:, None], kernel.view(1, 1, 1, 7), padding=(0, 3))
        return F.conv2d(across, kernel.view(1, 1, 7, 1), padding=(3, 0))[:, 0]

    mean = blur(gray)
    deviation = (blur(gray.square()) - mean.square()).abs().sqrt()
    return (gray - mean) / (deviation + 1 / 255)


def _fit(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shape, mean, left and right variance, [B] each, of asymmetric generalised Gaussians that have the moments of
    x [B, ...]."""
    x = x.flatten(1)
    left, right = ((x.square() * side).sum(1) / side.sum(1).clamp(min=1) for side in (x < 0, x >= 0))
    ratio = x.abs().mean(1).square() / x.square().mean(1).clamp(min=1e-12)
    gamma = (left / right.clamp(min=1e-12)).sqrt()
    ratio = ratio * (gamma**3 + 1) * (gamma + 1) / (gamma**2 + 1).square()
    # Gamma(2/a)^2 / (Gamma(1/a) Gamma(3/a)) grows with a: halve the interval in which it has that value.
    low, high = torch.full_like(ratio, math.log(0.05)), torch.full_like(ratio, math.log(20.0))
    for _ in range(50):
        middle = (low + high) / 2
        inverse = torch.exp(-middle)
        value = torch.exp(2 * gammaln(2 * inverse) - gammaln(inverse) - gammaln(3 * inverse))
        low, high = torch.where(value < ratio, middle, low), torch.where(value < ratio, high, middle)
    inverse = torch.exp(-(low + high) / 2)
    spread = torch.exp((gammaln(inverse) - gammaln(3 * inverse)) / 2 + gammaln(2 * inverse) - gammaln(inverse))
    return 1 / inverse, (right.sqrt() - left.sqrt()) * spread, left, right
