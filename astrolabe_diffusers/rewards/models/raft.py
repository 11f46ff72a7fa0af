"""RAFT's optical flow between the frames of a video."""

import re
from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F

from ...layouts.tensor_files import find_weights
from ..frames import FrameRequest, top_fraction_mean
from ..registry import register_reward
from ..reward import RewardOutput
from .model_reward import ModelReward, fetch, fill, read_weights


_WEIGHTS = ("raft-things.pth", "raft_large_C_T_V1-22a6c225.pth")
_ITERATIONS = 20
_FASTEST = 0.05
# Feature maps have an eighth of this, and the smallest of the four that are compared two pixels.
_SMALLEST = 128

# Names of princeton-vl/RAFT, as patterns, and torchvision's, one after the other; no tensor changes.
_ENCODER, _BLOCK = r"^(\w+_encoder)\.", r"(layer\d\.\d)\."
_NAMES = {
    r"^module\.": "",
    r"^fnet\.": "feature_encoder.",
    r"^cnet\.": "context_encoder.",
    _ENCODER + r"conv1\.": r"\1.convnormrelu.0.",
    _ENCODER + r"norm1\.": r"\1.convnormrelu.1.",
    _ENCODER + r"conv2\.": r"\1.conv.",
    _BLOCK + r"conv(\d)\.": r"\1.convnormrelu\2.0.",
    _BLOCK + r"norm([12])\.": r"\1.convnormrelu\2.1.",
    r"^update_block\.encoder\.conv\.": "update_block.motion_encoder.conv.0.",
    r"^update_block\.encoder\.convc(\d)\.": r"update_block.motion_encoder.convcorr\1.0.",
    r"^update_block\.encoder\.convf(\d)\.": r"update_block.motion_encoder.convflow\1.0.",
    r"^update_block\.gru\.conv([zrq])(\d)\.": r"update_block.recurrent_block.convgru\2.conv\1.",
    r"^update_block\.mask\.0\.": "mask_predictor.convrelu.0.",
    r"^update_block\.mask\.2\.": "mask_predictor.conv.",
}
# The norm of `downsample` once more.
_TWICE = re.compile(r"\.norm3\.")


@register_reward("raft_dynamic_degree")
@dataclass(eq=False)
class RaftDynamicDegree(ModelReward):
    """
    How fast the fastest parts of the picture move, by RAFT's optical flow: VBench's dynamic degree before its
    threshold, as CM-GRPO rewards it. Any motion counts, that of the camera and of artefacts too. Without weights
    `dynamic_degree` measures it.

    - Range: pixels of the video between two frames an eighth of a second apart, 0 if it is still; it grows with the
      resolution. A pair of frames has the mean of the 5 % largest magnitudes of its flow, after 20 iterations, a video
      the mean over its pairs. `above_threshold` in the info is the share of pairs above VBench's limit, 6 pixels where
      the short side has 256.
    - Frames: eight a second in their own size, at least 128 x 128; what is no multiple of 8 is padded with its edges.
    - Cost: 5.3 million parameters in float32; the correlations of a pair of 480 x 832 take 0.2 GB.
    - Weights: princeton-vl/RAFT's `raft-things.pth` (BSD-3-Clause, in the `models.zip` of that repository), or the
      same in torchvision's names, `raft_large_C_T_V1-22a6c225.pth`. Paper: arXiv 2003.12039. Without torchvision
      (`pip install astrolabe_diffusers[rewards]`) there is an `ImportError`.

    Args:
        checkpoint: file or folder of the weights, or Hub id of a repository that holds them under one of these names.
        frames, fps, batch_size, device: see [`ModelReward`]; `batch_size` counts pairs.
        dtype: "float32" alone.
    """

    uses_prompt = False

    checkpoint: str | None = None
    _: KW_ONLY
    frames: str = "rate:8"
    batch_size: int = 4
    dtype: str | None = "float32"

    def __post_init__(self):
        super().__post_init__()
        if self.dtype != torch.float32:
            raise ValueError("raft_dynamic_degree has the dtype float32 alone.")
        try:
            from torchvision.models.optical_flow import raft_large
        except (ImportError, RuntimeError) as error:  # the second from one that is made for another torch
            raise ImportError(
                f"raft_dynamic_degree needs torchvision: pip install 'astrolabe_diffusers[rewards]' ({error})"
            ) from None
        if self.checkpoint is None:
            raise ValueError(f"raft_dynamic_degree needs a checkpoint, the file {' or '.join(_WEIGHTS)}.")
        weights = torchvision_names(read_weights(find_weights(fetch(self.checkpoint, list(_WEIGHTS)), _WEIGHTS)))
        self.model = raft_large()
        fill(self.model, weights, f"this is no RAFT as {' or '.join(_WEIGHTS)} has it")
        self.model.to(self.device, self.dtype).eval().requires_grad_(False)

    def request(self, num_frames, height, width):
        if min(height, width) < _SMALLEST:
            least = f"{_SMALLEST} x {_SMALLEST}"
            raise ValueError(f"raft_dynamic_degree needs frames of at least {least} pixels, not {height} x {width}.")
        return FrameRequest(tuple(self.select(num_frames)))

    def score(self, videos, prompts, metadata=None):
        with torch.inference_mode():
            frames = self.requested(videos).to(self.current_device)
            if frames.shape[1] == 1:
                return RewardOutput(torch.zeros(len(frames)), {"above_threshold": torch.zeros(len(frames))})
            pairs = (frames[:, :-1].flatten(0, 1), frames[:, 1:].flatten(0, 1))
            parts = zip(*(part.split(self.batch_size) for part in pairs))
            speed = torch.cat([self.speed(*part) for part in parts]).view(len(frames), -1).cpu()
        threshold = 6 / 256 * min(frames.shape[-2:]) * max(1, 8 / self.fps)
        return RewardOutput(speed.mean(1), {"above_threshold": (speed > threshold).float().mean(1)})

    def speed(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """[N] in pixels, of pairs of frames, uint8 [N, 3, H, W] each."""
        rows, columns = (-side % 8 for side in first.shape[-2:])
        padding = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        pair = (2 * (F.pad(frame.float(), padding, mode="replicate") / 255) - 1 for frame in (first, second))
        flow = self.model(*pair, num_flow_updates=_ITERATIONS)[-1]
        return top_fraction_mean(flow.norm(dim=1).flatten(1), _FASTEST)


def torchvision_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """RAFT's tensors under torchvision's names; those that have them already keep them."""
    named = {}
    for name, tensor in weights.items():
        if not _TWICE.search(name):
            for pattern, replacement in _NAMES.items():
                name = re.sub(pattern, replacement, name)
            named[name] = tensor
    return named
