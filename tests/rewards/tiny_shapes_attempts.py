"""Clips that show less than their caption says, but might be taken for it; each from a scene and its motions."""

import torch

from tests.rewards.drawn_clips import SIZE, draw_mask, draw_masks, draw_scene, paint


FRAMES = 13


def changed(scene, field, values):
    """The scene whose objects have other values in a field."""
    return scene._replace(objects=tuple(o._replace(**{field: v}) for o, v in zip(scene.objects, values)))


def swapped(scene, field):
    """The scene whose objects have passed on the values of a field to the next one."""
    values = [getattr(o, field) for o in scene.objects]
    return changed(scene, field, values[1:] + values[:1])


def painted(scene, masks):
    """Masks [F, 96, 96], one an object, in the objects' colours."""
    picture = paint(torch.ones(FRAMES, SIZE, SIZE), scene.background, scene.background)
    for o, mask in reversed(list(zip(scene.objects, masks))):
        picture = paint(mask, o.color, picture)
    return picture


def masks_of(scene, motions):
    return [draw_masks(o.shape, o.direction, frames=FRAMES, **m) for o, m in zip(scene.objects, motions)]


def spare_color(scene):
    taken = {scene.background, *(o.color for o in scene.objects)}
    return next(c for c in ("yellow", "orange", "purple", "green") if c not in taken)


def redrawn(change):
    return lambda scene, motions: draw_scene(change(scene), motions, FRAMES)


def masked(change):
    return lambda scene, motions: painted(scene, [change(mask) for mask in masks_of(scene, motions)])


def resized(radius):
    return lambda scene, motions: draw_scene(scene, [m | {"radius": radius} for m in motions], FRAMES)


def reordered(frames):
    return lambda scene, motions: draw_scene(scene, motions, FRAMES)[frames]


def jumps(scene, motions):
    place = torch.rand(len(motions), FRAMES, 2, generator=torch.Generator().manual_seed(0)) * SIZE
    return painted(
        scene,
        [
            torch.stack([draw_mask(o.shape, *xy, m["radius"]) for xy in places.tolist()])
            for o, m, places in zip(scene.objects, motions, place)
        ],
    )


def outlines(scene, motions):
    inner = masks_of(scene, [m | {"radius": 0.75 * m["radius"]} for m in motions])
    return painted(scene, [mask - hole for mask, hole in zip(masks_of(scene, motions), inner)])


def dots(scene, motions):
    places = [(dx, dy) for dx in (-13, 0, 13) for dy in (-13, 0, 13)]
    small = masks_of(scene, [m | {"radius": 4.0} for m in motions])
    return painted(scene, [sum(mask.roll(place, (1, 2)) for place in places).clamp(max=1) for mask in small])


def two_colored(scene, motions):
    """The right half of each object has the colour of the next one, or of none that the caption has."""
    clip, colors = scene.background, [o.color for o in scene.objects]
    others = [*colors[1:], colors[0]] if len(colors) > 1 else [spare_color(scene)]
    for o, m, other, mask in zip(scene.objects, motions, others, masks_of(scene, motions)):
        dx = {"left": -1, "right": 1}.get(o.direction, 0)
        x = m["start"][0] + dx * m["speed"] * torch.arange(FRAMES)
        pixels = torch.arange(SIZE) + 0.5 - x[:, None]
        half = ((pixels + SIZE / 2) % SIZE - SIZE / 2 > 0).float()[:, None]
        clip = paint(mask * half, other, paint(mask, o.color, clip))
    return clip


def extra(scene, motions):
    added = draw_masks("circle", "up", frames=FRAMES, start=(10.0, 12.0), radius=12.0, speed=2.0)
    return paint(added, spare_color(scene), draw_scene(scene, motions, FRAMES))


def missing(scene, motions):
    return painted(scene, masks_of(scene, motions)[:-1])


def one_color(scene, motions):
    return draw_scene(changed(scene, "color", [scene.objects[0].color] * len(motions)), motions, FRAMES)


def hidden(scene, motions):
    """All objects lie behind the first and move with it."""
    first = scene.objects[0]
    behind = [motions[0]] + [motions[0] | {"radius": 0.6 * motions[0]["radius"]}] * (len(motions) - 1)
    return draw_scene(changed(scene, "direction", [first.direction] * len(motions)), behind, FRAMES)


def half_time(scene, motions):
    clip = draw_scene(scene, motions, FRAMES)
    clip[FRAMES // 2 :] = redrawn(lambda s: swapped(s, "color"))(scene, motions)[FRAMES // 2 :]
    return clip


def absent_half_time(scene, motions):
    clip = draw_scene(scene, motions, FRAMES)
    clip[FRAMES // 2 :] = painted(scene, [])[FRAMES // 2 :]
    return clip


def stripes(scene, motions):
    place = torch.arange(SIZE).expand(FRAMES, SIZE, SIZE) - 2 * torch.arange(FRAMES)[:, None, None]
    period = 12 * (len(motions) + 2)
    return painted(scene, [((place % period) // 12 == i).float() for i in range(len(motions))])


def noise(scene, motions):
    return torch.rand(FRAMES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def colored_noise(scene, motions):
    """Pixels of the right colours in the right amount, anywhere."""
    order = torch.rand(FRAMES, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return painted(scene, [((order > 0.06 * i) & (order < 0.06 * (i + 1))).float() for i in range(len(motions))])
