"""What rewards that are neural networks share: published files, frames in batches."""

import ast
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn

from ...errors import one_line
from ...layouts.tensor_files import load_tensors, misfits, select_weights
from ..frames import FrameRequest, FrameSelection, top_fraction_mean
from ..reward import Reward, RewardOutput, check_device


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(kw_only=True, eq=False)
class ModelReward(Reward):
    """
    A reward whose weights are those of its attribute `model`; it scores on the device that they are on.

    Args:
        frames: which frames, see [`FrameSelection`].
        fps: frames a second of the videos.
        batch_size: what is in one forward pass.
        device: where the weights are put, by default on the GPU if there is one.
        dtype: of the weights, by default "bfloat16" on a GPU and "float32" on the CPU.

    Raises:
        ValueError: files are missing or do not fit, or an option is out of its range; names them.
    """

    frames: str = "all"
    fps: float = 16.0
    batch_size: int = 16
    device: str | None = None
    dtype: str | None = None

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}.")
        self.select = FrameSelection(self.frames, self.fps)
        self.device = check_device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = self.dtype or ("float32" if self.device.type == "cpu" else "bfloat16")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}.")
        self.dtype = getattr(torch, dtype)

    @property
    def current_device(self) -> torch.device:
        return next(self.model.parameters()).device


@dataclass(kw_only=True, eq=False)
class FrameReward(ModelReward):
    """
    A reward that scores frames one by one. A video has the mean of the best `top_fraction` of them, of which 1 is all;
    the mean over all is `mean` in `info`. Other arguments are those of [`ModelReward`].
    """

    top_fraction: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.top_fraction <= 1:
            raise ValueError(f"top_fraction must be above 0 and at most 1, not {self.top_fraction}.")

    def request(self, num_frames, height, width):
        size = self.frame_size(height, width)
        return FrameRequest(tuple(self.select(num_frames)), as_pillow(size, height) if size else ())

    def score(self, videos, prompts, metadata=None):
        with torch.inference_mode():
            frames = self.requested(videos).to(self.current_device)
            texts = self.encode_prompts(prompts)
            owners = [text for text in texts for _ in range(frames.shape[1])]
            scores = [
                self.score_frames(part, owners[i * self.batch_size : i * self.batch_size + len(part)])
                for i, part in enumerate(frames.flatten(0, 1).split(self.batch_size))
            ]
            scores = torch.cat(scores).float().cpu().view(frames.shape[:2])
        return RewardOutput(top_fraction_mean(scores, self.top_fraction), {"mean": scores.mean(1)})

    def frame_size(self, height: int, width: int) -> tuple[int, int] | None:
        """The size that frames of this one are brought to, as Pillow does it; `None`: they stay as they are."""
        return None

    def encode_prompts(self, prompts: list[str]) -> list[Any]:
        """What `score_frames` wants of each prompt."""
        return prompts

    @abstractmethod
    def score_frames(self, frames: torch.Tensor, texts: list[Any]) -> torch.Tensor:
        """[N] of uint8 frames [N, 3, h, w] of `frame_size` and what `encode_prompts` made of the prompt of each."""


def normalize(frames: torch.Tensor) -> torch.Tensor:
    """uint8 frames [..., 3, H, W] in float32 with CLIP's mean and deviation, which Qwen2-VL has too."""
    # In float64, as transformers has it.
    return standardize((frames.double() * (1 / 255)).float())


def standardize(pixels: torch.Tensor) -> torch.Tensor:
    """float32 [..., 3, H, W] in [0, 1] less CLIP's mean and over its deviation."""
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


def as_pillow(size: tuple[int, int], height: int) -> tuple[tuple[int, int], ...]:
    """The two steps in which Pillow brings pictures of this height to a size."""
    return (height, size[1]), size


def fetch(source: str, patterns: list[str]) -> Path:
    """The folder or file `source`, or that Hub repository downloaded, as far as its files match `patterns`."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if path.is_absolute() or len(path.parts) != 2 or path.parts[0].startswith("."):
        raise ValueError(f"no such file or folder: {source}")
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except Exception as error:  # the client has a class for each way to fail
        reason = one_line(error)
        raise ValueError(f"{source} is no file or folder here, and the Hub did not give it: {reason}") from None


def read_weights(files: list[Path]) -> dict[str, torch.Tensor]:
    """The tensors of all files, memory-mapped."""
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors |= select_weights(load_tensors(file), ("model", "state_dict", "module"))
    return tensors


def fill(model: nn.Module, weights: dict[str, torch.Tensor], problem: str, remark: str = ""):
    """Puts `weights` into a model; a `ValueError` of `problem`, which do not fit, and `remark`, if some do not."""
    if found := misfits(weights, {name: tensor.shape for name, tensor in model.state_dict().items()}):
        raise ValueError(f"{problem}: {found}.{remark}")
    model.load_state_dict(weights, assign=True)


def read_template(model: str, files: list[Path], names: tuple[str, ...], remedy: str) -> str:
    """The strings that the first of these Python files that is there assigns to `names`, as one; it is not run."""
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        where = " or ".join(map(str, files))
        raise ValueError(f"{model} needs the text it was trained with, and {where} does not exist: {remedy}")
    found = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            found |= {target.id: node.value.value for target in node.targets if isinstance(target, ast.Name)}
    missing = [name for name in names if not isinstance(found.get(name), str)]
    if missing:
        raise ValueError(f"{file} assigns no text to {', '.join(missing)}.")
    return "".join(found[name] for name in names)
