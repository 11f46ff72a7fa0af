"""Pictures that a user gives a video to start from, at the size that the published models were trained with."""

from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKLWan
from diffusers.image_processor import PipelineImageInput
from diffusers.video_processor import VideoProcessor

from ..models.latent_frames import num_frames_of
from ..models.vae_streaming import encode_video


class BilinearVideoProcessor(VideoProcessor):
    """
    Resizes by antialiased bilinear interpolation, as torchvision's `Resize` does in Causal-Forcing's and
    Self-Forcing's image-to-video; diffusers takes Lanczos for pictures and the nearest pixel for arrays.
    """

    def __init__(self, vae_scale_factor: int):
        super().__init__(vae_scale_factor=vae_scale_factor, resample="bilinear", do_convert_rgb=True)

    def resize(self, image, height: int, width: int, resize_mode: str = "default"):
        """As the parent's; tensors are `(N, C, H, W)`."""
        if not isinstance(image, torch.Tensor):
            return super().resize(image, height, width, resize_mode)
        return torch.nn.functional.interpolate(image, (height, width), mode="bilinear", antialias=True)


@dataclass(frozen=True)
class StartFrames:
    """`image=`, `video=` and `strength=` of a call, checked; without a strength they are the video's first frames."""

    frames: torch.Tensor  # (N, 3, F, H, W) in [-1, 1], or latents (N, C, f, h, w)
    num_frames: int
    strength: float | None = None

    def encode(
        self, vae: AutoencoderKLWan, device: torch.device, batch_size: int, num_videos_per_prompt: int
    ) -> torch.Tensor:
        """Normalised latents of every video, float32; a `ValueError` if it is neither one for all nor one a prompt."""
        latents = self.frames.to(device)
        if latents.shape[1] != vae.config.z_dim:
            latents = encode_video(vae, latents)
        if len(latents) == 1:
            return latents.expand(batch_size, -1, -1, -1, -1)
        if len(latents) * num_videos_per_prompt != batch_size:
            raise ValueError(f"{len(latents)} images or videos to start from: pass one, or one a prompt.")
        return latents.repeat_interleave(num_videos_per_prompt, dim=0)


def read_start(
    pipe,
    image: PipelineImageInput | None,
    video: list | np.ndarray | torch.Tensor | None,
    strength: float | None,
    size: tuple[int, int],
) -> StartFrames | None:
    """What a call of the pipeline starts from, if it is given anything; `size` are height and width in pixels. A
    `ValueError` if both are given, a strength without a video, no whole number of blocks, or no frames in [0, 1]."""
    if image is not None and video is not None:
        raise ValueError("Provide either `image` or `video`, and not both.")
    if strength is not None and (video is None or not 0 < strength <= 1):
        raise ValueError(f"`strength={strength}` has to be in (0, 1] and needs a `video`.")
    if image is None and video is None:
        return None
    vae, processor, n = pipe.vae.config, pipe.video_processor, pipe.transformer.config.num_frames_per_block
    # They have more channels than a picture, and no whole number of blocks has that many frames.
    is_latents = isinstance(video, torch.Tensor) and video.ndim == 5 and video.shape[1] == vae.z_dim
    if image is not None:
        if n != 1:
            raise ValueError(
                f"`image` is one latent frame, but this model makes blocks of {n}: pass a `video` of "
                f"{pipe.frames_of_blocks(1)} frames, or use a model with blocks of one."
            )
        frames = processor.preprocess(unit_range(image, "image"), *size)[:, :, None]
    elif is_latents:
        frames = video.float()
        h, w = (length // vae.scale_factor_spatial for length in size)
        if frames.shape[3:] != (h, w) or not frames.isfinite().all():
            raise ValueError(
                f"latents of `video` must be finite and {h} x {w} for {size[0]} x {size[1]} pixels, but have the "
                f"shape {tuple(frames.shape)}."
            )
    else:
        frames = processor.preprocess_video(unit_range(video, "video"), *size)
    if not is_latents and frames.shape[1] != 3:
        name = "video" if image is None else "image"
        raise ValueError(
            f"`{name}` has {frames.shape[1]} channels, not 3: arrays are (..., H, W, 3), tensors (..., 3, H, W)."
        )
    num_frames = num_frames_of(pipe.vae, frames.shape[2]) if is_latents else frames.shape[2]
    if not num_frames or num_frames != pipe.frames_of_blocks(pipe.num_blocks(num_frames)):
        some = ", ".join(str(pipe.frames_of_blocks(number)) for number in (1, 2, 3))
        raise ValueError(f"`video` has {num_frames} frames, which is no whole number of blocks: {some}, ...")
    return StartFrames(frames, num_frames, strength)


def unit_range(frames: PIL.Image.Image | np.ndarray | torch.Tensor | list, name: str):
    """The same frames, checked, for diffusers' `VideoProcessor`, which takes arrays and tensors as they are: eight
    bits become floats in [0, 1]. Lists may be nested."""
    if isinstance(frames, (list, tuple)) and len(frames):
        return [unit_range(frame, name) for frame in frames]
    if isinstance(frames, PIL.Image.Image):
        return frames
    if not isinstance(frames, (np.ndarray, torch.Tensor)) or 0 in frames.shape:
        raise ValueError(f"`{name}` has to be images, arrays or tensors, and not empty, but is {type(frames)}.")
    if frames.ndim not in (3, 4, 5):
        raise ValueError(f"`{name}` has to have 3 to 5 dimensions but has the shape {tuple(frames.shape)}.")
    is_tensor = isinstance(frames, torch.Tensor)
    tensor = frames if is_tensor else torch.from_numpy(np.ascontiguousarray(frames))
    if tensor.dtype == torch.uint8:
        tensor = tensor.float() / 255
    elif not tensor.is_floating_point():
        raise ValueError(f"`{name}` has to be floats in [0, 1] or uint8, but is {tensor.dtype}.")
    low, high = (value.item() for value in tensor.aminmax())
    # Written so that NaN does not pass.
    if not (0 <= low and high <= 1):
        raise ValueError(f"`{name}` has to be floats in [0, 1] or uint8, but goes from {low:.4g} to {high:.4g}.")
    return tensor if is_tensor else tensor.numpy()
