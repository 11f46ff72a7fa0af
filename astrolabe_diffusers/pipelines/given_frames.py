"""Pictures that a user gives a video to start from."""

from __future__ import annotations

import numpy as np
import PIL.Image
import torch


def unit_range(frames: PIL.Image.Image | np.ndarray | torch.Tensor | list, name: str):
    """The same frames for diffusers' `VideoProcessor`, which takes arrays and tensors as they are: eight bits become
    floats in [0, 1], others are checked. Lists may be nested.

    Raises:
        ValueError: of another type or an empty list, or floats that are not finite or outside of [0, 1].
    """
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
