"""HPSv2.1, a CLIP tuned on human preferences, on the frames of a video."""

from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F

from ...layouts.tensor_files import find_weights
from ..registry import register_reward
from .model_reward import FrameReward, fetch, fill, read_weights, standardize


_WEIGHTS = ("HPS_v2.1_compressed.pt", "HPS_v2_compressed.pt")


@register_reward("video_hpsv2_local")
@dataclass(eq=False)
class HPSv2(FrameReward):
    """
    How much people would like the frames as pictures of the prompt.

    - Range: a cosine, in [-1, 1], about 0.2 to 0.35 for pictures; published tables have it times 100.
    - Frames: every one, and the mean of the best 30 %, as published. Each is shrunk or enlarged to 224 pixels on its
      longer side and padded with black to a square. That is done in floats and where the model is, so frames travel
      there in their own size.
    - Cost: ViT-H/14 (2 GB in bfloat16), 256 patches a frame, and 77 tokens a prompt.
    - Weights: `xswu/HPSv2` on the Hub (Apache-2.0). Paper: arXiv 2306.09341. Without open_clip (`pip install
      astrolabe_diffusers[rewards]`) there is an `ImportError`.

    Args:
        checkpoint: Hub id, folder or file of the weights.
        architecture: open_clip's name of the model.
        frames, fps, top_fraction, batch_size, device, dtype: see [`FrameReward`].
    """

    checkpoint: str = "xswu/HPSv2"
    architecture: str = "ViT-H-14"
    _: KW_ONLY
    top_fraction: float = 0.3
    batch_size: int = 32

    def __post_init__(self):
        super().__post_init__()
        try:
            import open_clip
        except ImportError as error:
            raise ImportError(
                f"video_hpsv2_local needs open_clip: pip install 'astrolabe_diffusers[rewards]' ({error})"
            ) from None
        weights = read_weights(find_weights(fetch(self.checkpoint, list(_WEIGHTS[:1])), _WEIGHTS))
        if self.architecture not in open_clip.list_models():
            raise ValueError(f"open_clip has no architecture {self.architecture!r}.")
        self.tokenize = open_clip.get_tokenizer(self.architecture)
        self.model = open_clip.create_model(self.architecture, pretrained=None, output_dict=True)
        fill(self.model, weights, f"this checkpoint does not fit {self.architecture}")
        self.model.to(self.device, self.dtype).eval().requires_grad_(False)
        self.side = self.model.visual.image_size[0]

    def encode_prompts(self, prompts):
        return list(self.model.encode_text(self.tokenize(prompts).to(self.device), normalize=True))

    def score_frames(self, frames, texts):
        pictures = standardize(letterbox(frames, self.side)).to(next(self.model.parameters()).dtype)
        return (self.model.encode_image(pictures, normalize=True).float() * torch.stack(texts).float()).sum(1)


def letterbox(frames: torch.Tensor, side: int) -> torch.Tensor:
    """float32 [N, 3, side, side], about [0, 1], of uint8 frames [N, 3, H, W]: the longer side becomes `side`; the rest
    is black. What bicubic throws beyond 0 and 1 stays, as in the published code, which resizes tensors."""
    height, width = frames.shape[-2:]
    scale = side / max(height, width)
    size = round(height * scale), round(width * scale)
    pixels = frames.float() / 255
    if size != (height, width):
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True)
    rows, columns = side - size[0], side - size[1]
    return F.pad(pixels, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
