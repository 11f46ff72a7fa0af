"""Pictures come to the size of the video as those that the published models were trained with."""

import numpy as np
import PIL.Image
import torch
from diffusers.video_processor import VideoProcessor


class BilinearVideoProcessor(VideoProcessor):
    """
    Resizes by antialiased bilinear interpolation, as torchvision's `Resize` does in Causal-Forcing's and
    Self-Forcing's image-to-video; diffusers takes Lanczos for pictures and the nearest pixel for arrays.
    """

    def __init__(self, vae_scale_factor: int):
        super().__init__(vae_scale_factor=vae_scale_factor, resample="bilinear", do_convert_rgb=True)

    def resize(
        self,
        image: PIL.Image.Image | np.ndarray | torch.Tensor,
        height: int,
        width: int,
        resize_mode: str = "default",
    ) -> PIL.Image.Image | np.ndarray | torch.Tensor:
        """As the parent's; tensors are `(N, C, H, W)`."""
        if not isinstance(image, torch.Tensor):
            return super().resize(image, height, width, resize_mode)
        return torch.nn.functional.interpolate(image, (height, width), mode="bilinear", antialias=True)
