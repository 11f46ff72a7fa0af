"""Training clips of tiny_shapes: one coloured shape moves over a plain background and comes back at the other side.

Attributes travel as index tensors [..., 4] in the order of `ATTRIBUTES` (color, shape, background, direction).
"""

from pathlib import Path

import torch

from astrolabe_diffusers.rewards.metrics.tiny_shapes import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    caption,
    shape_mask,
)


SIZE = 64
RADIUS = (11.0, 16.0)
SPEED = (1.2, 2.4)

_COUNTS = tuple(len(values) for values in ATTRIBUTES.values())


def combinations() -> torch.Tensor:
    """Long tensor [368, 4]: every combination whose object and background differ in colour."""
    table = torch.cartesian_prod(*(torch.arange(count) for count in _COUNTS))
    colors, backgrounds = ATTRIBUTES["color"], ATTRIBUTES["background"]
    return table[torch.tensor([colors[row[0]] != backgrounds[row[2]] for row in table.tolist()])]


def split(name: str) -> torch.Tensor:
    """The combinations of "train", [306, 4], or of "test", [62, 4], which are held out.

    A combination is held out if its indices add up to a multiple of 6, the number of colours: then exactly one colour
    is held out for every (shape, background, direction), and every pair of values is left in training.
    """
    every = combinations()
    held_out = every.sum(1) % len(COLORS) == 0
    return every[held_out if name == "test" else ~held_out]


def captions(attributes: torch.Tensor) -> list[str]:
    """The captions of attributes [N, 4]."""
    return [caption(*(values[i] for values, i in zip(ATTRIBUTES.values(), row))) for row in attributes.tolist()]


def switch_frames(num_frames: int) -> list[int]:
    """Pixel frames at which a block of 3 latent frames begins, the first one left out: latent frame 0 is pixel frame
    0, latent frame f >= 1 begins at pixel frame 1 + 4 (f - 1)."""
    return [1 + 4 * (f - 1) for f in range(3, (num_frames - 1) // 4 + 1, 3)]


def render(
    attributes: torch.Tensor,
    start: torch.Tensor,
    radius: torch.Tensor,
    speed: torch.Tensor,
    num_frames: int,
    before: torch.Tensor | None = None,
    switch_frame: torch.Tensor | None = None,
) -> torch.Tensor:
    """Clips [B, F, 3, 64, 64] in [0, 1] of attributes [B, 4]; the position goes on through a switch of the scene.

    Args:
        start: [B, 2], the centre (x, y) in the first frame, in pixels.
        radius, speed: [B], in pixels and in pixels a frame.
        before: [B, 4], the attributes in the frames before `switch_frame`.
        switch_frame: [B], the first frame with `attributes`; 0 where there is no switch.
    """
    device, batch = attributes.device, len(attributes)
    scene = attributes[:, None].expand(batch, num_frames, 4)
    if switch_frame is not None:
        early = torch.arange(num_frames, device=device) < switch_frame[:, None]
        scene = torch.where(early[..., None], before[:, None], scene)
    scene = scene.flatten(0, 1)
    palettes = (COLORS, BACKGROUNDS, DIRECTIONS)
    color, background, direction = (torch.tensor(list(p.values()), device=device) for p in palettes)

    step = direction[scene[:, 3]].view(batch, num_frames, 2) * speed[:, None, None]
    # Frame f stands where the motion of the frame before it has brought it.
    step = torch.cat([start[:, None], step[:, :-1]], dim=1)
    center = step.cumsum(1).flatten(0, 1)
    mask = shape_mask(scene[:, 1], center, radius.repeat_interleave(num_frames), SIZE, SIZE)[:, None]
    videos = torch.lerp(background[scene[:, 2]][..., None, None], color[scene[:, 0]][..., None, None], mask)
    return videos.view(batch, num_frames, 3, SIZE, SIZE)


def _mishear(attributes: torch.Tensor, caption_noise: float, generator: torch.Generator) -> torch.Tensor:
    """Replaces each attribute with probability `caption_noise` by another one, so that a training caption results."""
    known = torch.zeros(_COUNTS, dtype=torch.bool)
    known[split("train").unbind(1)] = True
    known = known.to(attributes.device)
    draw_on = generator.device
    heard = attributes.clone()
    for axis, count in enumerate(_COUNTS):
        index = list(heard.unbind(1))
        rows = known.movedim(axis, -1)[tuple(index[:axis] + index[axis + 1 :])]
        others = rows & (torch.arange(count, device=attributes.device) != index[axis][:, None])
        # The largest of independent uniform draws is a uniform choice among the allowed.
        draws = torch.rand(len(attributes), count + 1, generator=generator, device=draw_on).to(attributes.device)
        choice = draws[:, :count].masked_fill(~others, -1).argmax(1)
        heard[:, axis] = torch.where(draws[:, count] < caption_noise, choice, index[axis])
    return heard


def sample_batch(
    batch_size: int,
    num_frames: int,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    caption_noise: float = 0.0,
    switch_prob: float = 0.0,
) -> dict[str, torch.Tensor]:
    """Draws a batch of training clips and what their captions say. The draws come from the generator's device, so a
    CPU generator gives the same batch everywhere.

    Args:
        caption_noise: probability, for each attribute on its own, that the caption names another value instead. What
            it says then is always a caption of the training split.
        switch_prob: probability that the clip begins as another scene and turns into the described one at a block's
            first frame.

    Returns:
        `videos` float [B, F, 3, 64, 64] in [0, 1]; `attributes` long [B, 4], what is seen from `switch_frame` on;
        `caption_attributes` long [B, 4], what the caption says of it; `switch_frame` long [B], 0 where there is no
        switch; `before` long [B, 4], what is seen before the switch.
    """

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, device=generator.device).to(device)

    def choice(values):
        index = torch.randint(len(values), (batch_size,), generator=generator, device=generator.device)
        return values[index.cpu()].to(device)

    allowed = split("train")
    attributes, before = choice(allowed), choice(allowed)
    start = uniform(batch_size, 2) * SIZE
    radius = RADIUS[0] + uniform(batch_size) * (RADIUS[1] - RADIUS[0])
    speed = SPEED[0] + uniform(batch_size) * (SPEED[1] - SPEED[0])
    switch_frame = torch.zeros(batch_size, dtype=torch.long, device=device)
    if switch_prob > 0:
        frames = switch_frames(num_frames)
        if not frames:
            raise ValueError(f"{num_frames} frames are a single block; a scene switch needs at least 21.")
        switch_frame = torch.where(uniform(batch_size) < switch_prob, choice(torch.tensor(frames)), 0)
    return {
        "videos": render(attributes, start, radius, speed, num_frames, before, switch_frame),
        "attributes": attributes,
        "caption_attributes": _mishear(attributes, caption_noise, generator),
        "before": torch.where(switch_frame[:, None] > 0, before, attributes),
        "switch_frame": switch_frame,
    }


def write_prompts(folder: str | Path) -> None:
    """Writes `train.txt` and `test.txt`, one caption a line, in a fixed order in which any first lines are varied."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "test"):
        rows = split(name)
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
        (folder / f"{name}.txt").write_text("\n".join(captions(rows)) + "\n")
