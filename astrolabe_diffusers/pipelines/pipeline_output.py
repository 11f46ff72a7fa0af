from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput


@dataclass
class CausalWanPipelineOutput(BaseOutput):
    """
    The videos, by `output_type`: `"np"` an array `(B, F, H, W, 3)` in [0, 1], `"pt"` a tensor `(B, F, 3, H, W)` in
    [0, 1], `"pil"` a list of lists of images, `"latent"` the normalised latents `(B, C, f, h, w)`.
    """

    frames: torch.Tensor | np.ndarray | list[list[PIL.Image.Image]]
