"""Clips of tiny_shapes drawn point by point, independently of how the package draws them."""

import math

import torch

from astrolabe_diffusers.rewards.metrics.tiny_shapes import BACKGROUNDS, COLORS


SIZE = 64
FINE = 4
STEP = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def draw_mask(shape, x, y, radius):
    """float tensor [64, 64]: the shape centred at (x, y); what leaves at one border comes in at the other."""
    points = (torch.arange(SIZE * FINE) + 0.5) / FINE
    px = ((points[None, :] - x + SIZE / 2) % SIZE - SIZE / 2) / radius
    py = ((points[:, None] - y + SIZE / 2) % SIZE - SIZE / 2) / radius
    if shape == "circle":
        inside = px**2 + py**2 < 1
    elif shape == "square":
        inside = (px.abs() < 0.89) & (py.abs() < 0.89)
    elif shape == "triangle":
        corners = [(1.4 * math.cos(a), 1.4 * math.sin(a)) for a in (-math.pi / 2, math.pi / 6, 5 * math.pi / 6)]
        # Inside is to the same side of each of the three edges.
        inside = torch.ones(SIZE * FINE, SIZE * FINE, dtype=torch.bool)
        for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]):
            inside &= (bx - ax) * (py - ay) > (by - ay) * (px - ax)
    elif shape == "cross":
        inside = ((px.abs() < 1.15) & (py.abs() < 0.38)) | ((px.abs() < 0.38) & (py.abs() < 1.15))
    return inside.float().view(SIZE, FINE, SIZE, FINE).mean((1, 3))


def paint(mask, color, background):
    """[..., 3, 64, 64]: masks [..., 64, 64] in a colour over a background."""
    color, background = (torch.tensor({**COLORS, **BACKGROUNDS}[name]).view(3, 1, 1) for name in (color, background))
    return background + mask[..., None, :, :] * (color - background)


def draw_masks(shape, direction, frames=21, start=(20.0, 30.0), radius=10.0, speed=1.8):
    """float tensor [F, 64, 64]."""
    dx, dy = STEP[direction]
    return torch.stack(
        [draw_mask(shape, start[0] + dx * speed * f, start[1] + dy * speed * f, radius) for f in range(frames)]
    )


def draw_clip(color, shape, background, direction, **motion):
    """float tensor [F, 3, 64, 64]."""
    return paint(draw_masks(shape, direction, **motion), color, background)
