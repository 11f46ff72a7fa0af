"""LAION's aesthetic predictor on the frames of a video."""

from collections import OrderedDict
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise

from accelerate import init_empty_weights
from torch import nn

from ...layouts.tensor_files import find_weights
from ..registry import register_reward
from .model_reward import FrameReward, fetch, fill, normalize, read_weights


_WEIGHTS = ("sac+logos+ava1-l14-linearMSE.pth", "aesthetic-model.pth")


@register_reward("aesthetic")
@dataclass(eq=False)
class Aesthetic(FrameReward):
    """
    How beautiful the frames are as pictures; the prompt does not count.

    - Range: about 1 to 10, most pictures 4 to 7.
    - Frames: every one, and their mean. Each is resized to 224 pixels on its shorter side; the square in its middle
      counts.
    - Cost: the picture half of CLIP ViT-L/14 (0.6 GB in bfloat16), 256 patches a frame.
    - Weights: `sac+logos+ava1-l14-linearMSE.pth` of improved-aesthetic-predictor (Apache-2.0), which the Hub has as
      `trl-lib/ddpo-aesthetic-predictor`, on openai/clip-vit-large-patch14 (MIT).

    Args:
        checkpoint: Hub id, folder or file of the predictor.
        base: Hub id or folder of CLIP.
        frames, fps, top_fraction, batch_size, device, dtype: see [`FrameReward`]; the predictor has float32.
    """

    uses_prompt = False

    checkpoint: str = "trl-lib/ddpo-aesthetic-predictor"
    base: str = "openai/clip-vit-large-patch14"
    _: KW_ONLY
    batch_size: int = 64

    def __post_init__(self):
        super().__post_init__()
        from transformers import CLIPModel

        weights = read_weights(find_weights(fetch(self.checkpoint, list(_WEIGHTS)), _WEIGHTS))
        folder = fetch(self.base, ["config.json", "model.safetensors"])
        clip, report = CLIPModel.from_pretrained(folder, dtype=self.dtype, output_loading_info=True)
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"{self.base} is no CLIP: it lacks {', '.join(missing[:3])}, {len(missing)} in all.")
        sizes = (clip.config.projection_dim, 1024, 128, 64, 16, 1)
        with init_empty_weights():
            # Nothing stands between them, and stood there in training, but dropout: hence the numbers.
            layers = {str(place): nn.Linear(*pair) for place, pair in zip((0, 2, 4, 6, 7), pairwise(sizes))}
            predictor = nn.Sequential(OrderedDict(layers=nn.Sequential(OrderedDict(layers))))
        fill(predictor, weights, f"this aesthetic predictor does not fit {self.base}")
        self.side = clip.config.vision_config.image_size
        del clip.text_model, clip.text_projection
        self.model = nn.ModuleDict({"clip": clip, "predictor": predictor.float()})
        self.model.to(self.device).eval().requires_grad_(False)

    def frame_size(self, height, width):
        short = min(height, width)
        return int(self.side * height / short), int(self.side * width / short)

    def score_frames(self, frames, texts):
        top, left = ((side - self.side) // 2 for side in frames.shape[-2:])
        middle = frames[..., top : top + self.side, left : left + self.side]
        clip, predictor = self.model.values()
        features = clip.visual_projection(clip.vision_model(normalize(middle).to(clip.dtype)).pooler_output).float()
        return predictor(features / features.norm(dim=1, keepdim=True))[:, 0]
