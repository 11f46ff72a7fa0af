"""Bicubic resizing with antialiasing written from its formula, in float64."""

import numpy as np


def weights(size: int, new: int) -> np.ndarray:
    """[new, size]: what each of `size` pixels gives to each of `new`, Keys' kernel with a = -1/2 stretched over the
    pixels that become one."""
    scale = size / new
    stretch = max(scale, 1.0)
    matrix = np.zeros((new, size))
    for i in range(new):
        for j in range(size):
            x = abs(j + 0.5 - (i + 0.5) * scale) / stretch
            if x < 1:
                matrix[i, j] = 1.5 * x**3 - 2.5 * x**2 + 1
            elif x < 2:
                matrix[i, j] = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return matrix / matrix.sum(1, keepdims=True)


def resize(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """float64 [..., height, width] of frames [..., H, W]."""
    rows, columns = weights(frames.shape[-2], height), weights(frames.shape[-1], width)
    return rows @ frames.astype(np.float64) @ columns.T
