"""Training clips of tiny_shapes: one to three coloured shapes move over a plain background, come back at the other
side and, in some clips, turn into another scene at a block's first frame.

A scene is a row of an index tensor [..., 10]: colour, shape and direction of up to three objects, -1 where there is
none, and the background. The first object is drawn in front.
"""

from pathlib import Path

import torch

from astrolabe_diffusers.rewards.metrics.tiny_shapes_world import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    MAX_OBJECTS,
    SHAPES,
    Object,
    Scene,
    caption,
    shape_mask,
    shortest,
)


SIZE = 96
# In pixels, by the number of objects; and in pixels a frame.
RADIUS = {1: (16.0, 24.0), 2: (13.0, 18.0), 3: (11.0, 15.0)}
SPEED = (1.6, 3.2)
# Three are rare, as hard captions are: the model draws them as well, but leaves one out or melts two into one, which
# is what reinforcement learning mends.
OBJECT_SHARES = (0.4, 0.59, 0.01)
# Of the clips that change: those whose objects jump; and those whose scenes are one edit apart.
HARD_SHARE, EDIT_SHARE = 0.25, 0.5
# Places that are drawn for the objects of a clip; the one where they are farthest apart is taken.
_PLACES = 16
_NAMES = (tuple(COLORS), SHAPES, tuple(DIRECTIONS))


def held_out(scenes: torch.Tensor) -> torch.Tensor:
    """Bool [...]: whether scenes [..., 10] never occur in training: their indices add up to a multiple of 6.

    A sixth of all; any two values of a scene occur together in training.
    """
    return scenes.clamp(min=0).sum(-1) % len(COLORS) == 0


def captions(scenes: torch.Tensor) -> list[str]:
    """The captions of scenes [N, 10]."""
    backgrounds, result = tuple(BACKGROUNDS), []
    for *objects, background in scenes.tolist():
        rows = [objects[i : i + 3] for i in range(0, len(objects), 3) if objects[i] >= 0]
        named = tuple(Object(*(names[i] for names, i in zip(_NAMES, row))) for row in rows)
        result.append(caption(Scene(named, backgrounds[background])))
    return result


def single_object_scenes() -> torch.Tensor:
    """Long tensor [368, 10]: every scene of one object."""
    table = torch.cartesian_prod(*(torch.arange(len(names)) for names in (*_NAMES, BACKGROUNDS)))
    seen = [list(COLORS)[color] != list(BACKGROUNDS)[background] for color, _, _, background in table.tolist()]
    table = table[torch.tensor(seen)]
    absent = torch.full((len(table), 3 * (MAX_OBJECTS - 1)), -1)
    return torch.cat([table[:, :3], absent, table[:, 3:]], dim=1)


class Draws:
    """Random numbers for batches, drawn on the generator's device: a CPU generator gives the same on every device."""

    def __init__(self, generator: torch.Generator, device: torch.device | str):
        self.generator, self.device = generator, device

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        draws = torch.rand(*shape, generator=self.generator, device=self.generator.device)
        return low + (high - low) * draws.to(self.device)

    def below(self, count: int, *shape: int) -> torch.Tensor:
        return torch.randint(count, shape, generator=self.generator, device=self.generator.device).to(self.device)


def draw_scenes(number: int, draws: Draws, num_objects: torch.Tensor) -> torch.Tensor:
    """Random scenes [N, 10] with `num_objects` [N] objects each, held-out ones among them."""
    background = draws.below(len(BACKGROUNDS), number)
    taken = torch.tensor([[color == name for color in COLORS] for name in BACKGROUNDS], device=draws.device)
    order = draws.uniform(number, len(COLORS)).masked_fill(taken[background], -1).argsort(1, descending=True)
    shape, direction = (draws.below(len(names), number, MAX_OBJECTS) for names in (SHAPES, DIRECTIONS))
    objects = torch.stack([order[:, :MAX_OBJECTS], shape, direction], dim=2)
    absent = torch.arange(MAX_OBJECTS, device=draws.device) >= num_objects[:, None]
    return torch.cat([objects.masked_fill(absent[..., None], -1).flatten(1), background[:, None]], dim=1)


def training_scenes(number: int, draws: Draws) -> torch.Tensor:
    """Random scenes [N, 10] of training; `OBJECT_SHARES` of them have one, two and three objects."""
    limits = torch.tensor(OBJECT_SHARES, device=draws.device).cumsum(0)[:-1]
    num_objects = 1 + (draws.uniform(number, 1) > limits).sum(1)
    scenes = draw_scenes(number, draws, num_objects)
    while (again := held_out(scenes)).any():
        scenes = torch.where(again[:, None], draw_scenes(number, draws, num_objects), scenes)
    return scenes


def edited_scenes(scenes: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Scenes [N, 10] one edit away: another value in one place, an object more or the last object less.

    Of the three kinds one that gives a scene of training is taken; where none does, any other scene.
    """
    number, width = scenes.shape
    whole = draw_scenes(number, draws, torch.full((number,), MAX_OBJECTS, device=scenes.device))
    columns = torch.arange(width, device=scenes.device)
    differs = (scenes >= 0) & (scenes != whole)
    place = draws.uniform(number, width).masked_fill(~differs, -1).argmax(1, keepdim=True)
    count = (scenes[:, :-1:3] >= 0).sum(1, keepdim=True)
    slots = torch.where(columns < width - 1, columns // 3, -1)
    edits = torch.stack(
        [
            torch.where(columns == place, whole, scenes),
            torch.where(slots == count, whole, scenes),
            torch.where(slots == count - 1, -1, scenes),
        ]
    )
    good = torch.stack([is_scene(edit) & ~held_out(edit) & (edit != scenes).any(1) for edit in edits])
    kind = draws.uniform(len(edits), number).masked_fill(~good, -1).argmax(0)
    edited = edits[kind, torch.arange(number, device=scenes.device)]
    return torch.where(good.any(0)[:, None], edited, training_scenes(number, draws))


def is_scene(rows: torch.Tensor) -> torch.Tensor:
    """Bool [N]: whether rows [N, 10] have a first object, objects that are whole, and no colour twice."""
    objects = rows[:, :-1].unflatten(1, (MAX_OBJECTS, 3))
    whole = (objects >= 0).all(2)
    colors = torch.where(whole, objects[..., 0], -1 - torch.arange(MAX_OBJECTS, device=rows.device))
    names = list(BACKGROUNDS)
    as_color = torch.tensor([list(COLORS).index(n) if n in COLORS else -9 for n in names], device=rows.device)
    colors = torch.cat([colors, as_color[rows[:, -1:]]], dim=1).sort(1).values
    return whole[:, 0] & (whole == (objects >= 0).any(2)).all(1) & (colors.diff(dim=1) != 0).all(1)


def switch_frames(num_frames: int) -> list[int]:
    """Pixel frames at which a block of 3 latent frames begins, the first one left out: latent frame 0 is pixel frame
    0, latent frame f >= 1 begins at pixel frame 1 + 4 (f - 1)."""
    return [1 + 4 * (f - 1) for f in range(3, (num_frames - 1) // 4 + 1, 3)]


def paths(scenes: torch.Tensor, speed: torch.Tensor) -> torch.Tensor:
    """How far the objects [B, F, 3, 2] of scenes [B, F, 10] have moved since the first frame, at `speed` [B, 3]."""
    direction = torch.tensor([*DIRECTIONS.values(), (0.0, 0.0)], device=scenes.device)  # -1: nothing moves
    step = direction[scenes[..., 2:-1:3]] * speed[:, None, :, None]
    # Frame f stands where the motion of the frame before it has brought it.
    return torch.cat([torch.zeros_like(step[:, :1]), step[:, :-1]], dim=1).cumsum(1)


def places_apart(draws: Draws, moved: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Places [B, 3, 2] at which objects are far apart, after they have moved by any of `moved` [B, M, 3, 2].

    `there` [B, M, 3] tells which objects are there at that time.
    """
    batch = len(moved)
    places = draws.uniform(batch, _PLACES, MAX_OBJECTS, 2, high=SIZE)
    at = places[:, :, None] + moved[:, None]
    distance = shortest(at[..., :, None, :] - at[..., None, :, :], SIZE).norm(dim=-1)  # (B, places, M, 3, 3)
    both = there[..., :, None] & there[..., None, :] & ~torch.eye(MAX_OBJECTS, dtype=torch.bool, device=there.device)
    nearest = distance.masked_fill(~both[:, None], SIZE).flatten(2).min(2).values
    return places[torch.arange(batch, device=places.device), nearest.argmax(1)]


def render(scenes: torch.Tensor, centers: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Clips [B, F, 3, 96, 96] in [0, 1] of scenes [B, F, 10], with objects of `radius` [B, 3] at `centers`
    [B, F, 3, 2], x and y in pixels."""
    batch, frames = scenes.shape[:2]
    scenes, centers = scenes.flatten(0, 1), centers.flatten(0, 1)
    colors, backgrounds = (torch.tensor(list(p.values()), device=scenes.device) for p in (COLORS, BACKGROUNDS))
    videos = backgrounds[scenes[:, -1]][..., None, None].expand(-1, -1, SIZE, SIZE)
    for i in reversed(range(MAX_OBJECTS)):
        color, shape, _ = scenes[:, 3 * i : 3 * i + 3].unbind(1)
        mask = shape_mask(shape, centers[:, i], radius[:, i].repeat_interleave(frames), SIZE, SIZE)
        mask = mask * (color >= 0)[:, None, None]
        videos = torch.lerp(videos, colors[color][..., None, None].expand_as(videos), mask[:, None])
    return videos.view(batch, frames, 3, SIZE, SIZE)


def sample_batch(
    batch_size: int,
    num_frames: int,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    switch_prob: float = 0.0,
) -> dict[str, torch.Tensor]:
    """Draws a batch of training clips. A CPU generator gives the same batch everywhere.

    Args:
        switch_prob: probability that the clip becomes another scene at a block's first frame. Its objects change where
            they are and go on, or all jump to other places (`HARD_SHARE`).

    Returns:
        `videos` float [B, F, 3, 96, 96] in [0, 1]; `before` and `after` long [B, 10], the scenes, equal where there is
        no switch; `switch_frame` long [B], the first frame of `after`; 0 where there is no switch.
    """
    draws = Draws(generator, device)
    before, after = training_scenes(batch_size, draws), training_scenes(batch_size, draws)
    edited = edited_scenes(before, draws)
    after = torch.where(draws.uniform(batch_size, 1) < EDIT_SHARE, edited, after)
    switch_frame = torch.zeros(batch_size, dtype=torch.long, device=device)
    if switch_prob > 0:
        frames = switch_frames(num_frames)
        if not frames:
            raise ValueError(f"{num_frames} frames are a single block; a scene switch needs at least 13.")
        at = torch.tensor(frames, device=device)[draws.below(len(frames), batch_size)]
        switch_frame = torch.where(draws.uniform(batch_size) < switch_prob, at, 0)
    switched = switch_frame > 0
    after = torch.where(switched[:, None], after, before)
    late = torch.arange(num_frames, device=device) >= switch_frame[:, None]
    scenes = torch.where(late[..., None], after[:, None], before[:, None])

    there = torch.stack([before, after], dim=1)[..., :-1:3] >= 0  # (B, 2, 3)
    limits = torch.tensor([RADIUS[i + 1] for i in range(MAX_OBJECTS)], device=device)
    low, high = limits[there.sum(2).max(1).values - 1].unbind(1)
    radius = low[:, None] + (high - low)[:, None] * draws.uniform(batch_size, MAX_OBJECTS)
    moved = paths(scenes, draws.uniform(batch_size, MAX_OBJECTS, low=SPEED[0], high=SPEED[1]))
    at_switch = moved[torch.arange(batch_size, device=device), switch_frame]
    start = places_apart(draws, torch.stack([moved[:, 0], at_switch], dim=1), there)
    again = places_apart(draws, moved[:, :1], there[:, 1:]) - at_switch
    jumps = switched & (draws.uniform(batch_size) < HARD_SHARE)
    jumped = (late & jumps[:, None])[..., None, None]
    centers = moved + torch.where(jumped, again[:, None], start[:, None])
    return {"videos": render(scenes, centers, radius), "before": before, "after": after, "switch_frame": switch_frame}


def write_prompts(folder: str | Path, number: int = 320, num_held_out: int = 64) -> None:
    """Writes captions, one a line: of three objects `train.txt`, `validation.txt`, with which settings are tuned, and
    `test.txt`; and the same of one and two objects in `one_object` and `two_objects`. The last two are held out.

    Half of the first `train.txt` has one or two objects: trained on three alone, the model soon draws three whatever
    is asked for.
    """
    draws = Draws(torch.Generator().manual_seed(0), "cpu")
    train = {}
    for name, count in (("", 3), ("two_objects", 2), ("one_object", 1)):
        if count == 1:
            scenes = single_object_scenes()
            scenes = scenes[torch.randperm(len(scenes), generator=draws.generator)]
        else:
            scenes = draw_scenes(12 * number, draws, torch.full((12 * number,), count))
        lines = {kind: captions(scenes[held_out(scenes) == kind]) for kind in (False, True)}
        unseen = list(dict.fromkeys(lines[True]))
        half = min(num_held_out, len(unseen) // 2)
        train[name] = list(dict.fromkeys(lines[False]))[:number]
        (Path(folder) / name).mkdir(parents=True, exist_ok=True)
        for split, texts in {"validation": unseen[:half], "test": unseen[half : 2 * half]}.items():
            (Path(folder) / name / f"{split}.txt").write_text("\n".join(texts) + "\n")
    easier = number // 4
    train[""] = train[""][: number - 2 * easier] + train["two_objects"][:easier] + train["one_object"][:easier]
    for name, texts in train.items():
        (Path(folder) / name / "train.txt").write_text("\n".join(texts) + "\n")
