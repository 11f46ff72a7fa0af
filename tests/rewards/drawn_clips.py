"""Clips of tiny_shapes drawn point by point, independently of how the package draws them."""

import itertools
import math

import torch

from astrolabe_diffusers.rewards.metrics.tiny_shapes_world import BACKGROUNDS, COLORS, SHAPES, Object, Scene


SIZE = 96
FINE = 4
STEP = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def draw_mask(shape, x, y, radius):
    """float tensor [96, 96]: the shape centred at (x, y); what leaves at one border comes in at the other."""
    # Only pixels that the widest shape can reach are drawn, the middle one of them that under the centre.
    reach = min(math.ceil(1.42 * radius) + 1, SIZE // 2)
    rows, columns = (torch.arange(2 * reach) - reach + math.floor(middle) for middle in (y, x))
    fine = (torch.arange(2 * reach * FINE) + 0.5) / FINE
    px, py = ((fine + columns[0] - x) / radius)[None, :], ((fine + rows[0] - y) / radius)[:, None]
    if shape == "circle":
        inside = px**2 + py**2 < 1
    elif shape == "square":
        inside = (px.abs() < 0.89) & (py.abs() < 0.89)
    elif shape == "triangle":
        corners = [(1.4 * math.cos(a), 1.4 * math.sin(a)) for a in (-math.pi / 2, math.pi / 6, 5 * math.pi / 6)]
        # Inside is to the same side of each of the three edges.
        inside = torch.ones(1, 1, dtype=torch.bool)
        for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]):
            inside = inside & ((bx - ax) * (py - ay) > (by - ay) * (px - ax))
    elif shape == "cross":
        inside = ((px.abs() < 1.15) & (py.abs() < 0.38)) | ((px.abs() < 0.38) & (py.abs() < 1.15))
    mask = torch.zeros(SIZE, SIZE)
    mask[rows[:, None] % SIZE, columns % SIZE] = inside.float().view(2 * reach, FINE, 2 * reach, FINE).mean((1, 3))
    return mask


def paint(mask, color, background):
    """[..., 3, 96, 96]: masks [..., 96, 96] in a colour over a background, a colour's name or such a picture."""
    if isinstance(background, str):
        background = torch.tensor({**COLORS, **BACKGROUNDS}[background]).view(3, 1, 1)
    return torch.lerp(background, torch.tensor({**COLORS, **BACKGROUNDS}[color]).view(3, 1, 1), mask[..., None, :, :])


def draw_masks(shape, direction, frames=21, start=(30.0, 45.0), radius=16.0, speed=2.4):
    """float tensor [F, 96, 96]."""
    dx, dy = STEP[direction]
    return torch.stack(
        [draw_mask(shape, start[0] + dx * speed * f, start[1] + dy * speed * f, radius) for f in range(frames)]
    )


def draw_clip(color, shape, background, direction, **motion):
    """float tensor [F, 3, 96, 96]: one object."""
    return paint(draw_masks(shape, direction, **motion), color, background)


def draw_scene(scene, motions, frames=21):
    """float tensor [F, 3, 96, 96]: the objects of a scene, the first in front, each with its start, radius, speed."""
    picture = scene.background
    for (color, shape, direction), motion in reversed(list(zip(scene.objects, motions))):
        picture = paint(draw_masks(shape, direction, frames=frames, **motion), color, picture)
    return picture


# Pixels of the plane of 96, for one, two and three objects; pixels a frame.
RADIUS = {1: (16, 24), 2: (13, 18), 3: (11, 15)}
SPEED = (1.5, 3.2)


def random_scene(random, count, crossing=False):
    """
    A scene of `count` objects and their motions, by a `random.Random`. They begin apart: 96 / count pixels along both
    axes, or, with `crossing`, just beside each other, and all on the way to about the same place.
    """
    background = random.choice(list(BACKGROUNDS))
    colors = random.sample([color for color in COLORS if color != background], count)
    directions = random.sample(list(STEP), count) if crossing else random.choices(list(STEP), k=count)
    objects = tuple(Object(color, random.choice(SHAPES), way) for color, way in zip(colors, directions))
    radii = [random.uniform(*RADIUS[count]) for _ in objects]
    speeds = [random.uniform(*SPEED) for _ in objects]
    x, y = random.uniform(0, SIZE), random.uniform(0, SIZE)
    starts = [(x + SIZE / count * i, y + SIZE / count * i) for i in range(count)]
    if crossing:
        velocity = [(speed * STEP[way][0], speed * STEP[way][1]) for speed, way in zip(speeds, directions)]
        pairs = itertools.combinations(range(count), 2)
        frames = max(1.15 * (radii[i] + radii[j]) / math.dist(velocity[i], velocity[j]) for i, j in pairs)
        starts = [(x - frames * dx + random.uniform(-5, 5), y - frames * dy) for dx, dy in velocity]
    motions = [dict(start=start, radius=r, speed=speed) for start, r, speed in zip(starts, radii, speeds)]
    return Scene(objects, background), motions
