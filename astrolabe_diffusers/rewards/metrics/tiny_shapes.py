"""A reward of the tiny_shapes world: how well a clip of moving coloured shapes fits its caption."""

import itertools
from typing import NamedTuple

import torch

from ..registry import register_reward
from ..reward import Reward, RewardOutput
from .tiny_shapes_outlines import SIDE, centroid, complete, overlap, patches, templates
from .tiny_shapes_world import BACKGROUNDS, COLORS, DIRECTIONS, MAX_OBJECTS, SHAPES, Scene, parse_caption, shortest


_ALL_COLORS = {**COLORS, **BACKGROUNDS}
# Of the frame: less of a colour is nothing.
_LEAST = 0.005
# The share of the time in which a hidden object must be seen at least to count in full.
_SEEN = 1 / 3


def _ramp(x: torch.Tensor, start: float, end: float) -> torch.Tensor:
    """0 up to `start`, 1 from `end` on, linear between; `start` may be the larger one."""
    return ((x - start) / (end - start)).clamp(0, 1)


@register_reward("tiny_shapes_prompt_match")
class TinyShapesPromptMatch(Reward):
    """
    How well a clip shows what its caption says, measured from the pixels. One object is looked for in each colour of
    this world, whatever the caption says, and the found ones are assigned to the caption's objects such that the score
    is the highest. Four parts, each in [0, 1], are logged on their own, the first three as means over the caption's
    objects:

    - `color`: how close the object's pixels are to the colour, against all other colours of this world.
    - `shape`: overlap of the object with the shape's outline at the object's place and size, against the other shapes.
    - `direction`: the share of the motion that goes the right way. Below 0.75 / 64 of the frame a frame, motion is too
      slow to count in full.
    - `background`: how close the pixels beside the objects are to the background colour.

    Each is measured frame by frame (the direction over a few frames) and averaged, so a clip that is right half of the
    time gets half. Colour, shape and direction count only as far as there is one object of that colour: something that
    covers 2 to 20 % of the frame and is compact. Where another object hides a part of it, it is completed; frames that
    hide most of it count less, as long as it is seen in a third of the time.

    The score, in [0, 1] and continuous, is not the mean of the parts: it is the mean over the caption's objects of
    mean(parts) * (0.3 + 0.7 * min(1, 2 * the smallest part)), times the share of objects that the caption asked for.
    Two objects that swapped their colours have three parts of four, but are not three quarters of what was asked for.
    A prompt that is no caption raises `ValueError`.
    """

    def score(self, videos, prompts, metadata=None):
        wanted = _wanted([parse_caption(prompt) for prompt in prompts], videos.device)
        # Some clips at a time: about 72 frames need little memory and are enough for a GPU.
        tracks = [_measure(clips.float()) for clips in videos.split(max(1, 72 // videos.shape[1]))]
        scores, parts = _match(_Tracks(*map(torch.cat, zip(*tracks))), wanted)
        return RewardOutput(scores.cpu(), {name: part.cpu() for name, part in parts.items()})


class _Wanted(NamedTuple):
    """What captions say, as indices: of objects [B, MAX_OBJECTS], as far as they are `real`, and background [B]."""

    real: torch.Tensor
    color: torch.Tensor
    shape: torch.Tensor
    direction: torch.Tensor
    background: torch.Tensor


def _wanted(scenes: list[Scene], device: torch.device) -> _Wanted:
    vocabulary = tuple(COLORS), SHAPES, tuple(DIRECTIONS)
    rows = []
    for scene in scenes:
        row = [(1, *(words.index(word) for words, word in zip(vocabulary, o))) for o in scene.objects]
        rows.append(row + [(0, 0, 0, 0)] * (MAX_OBJECTS - len(row)))
    background = torch.tensor([tuple(BACKGROUNDS).index(scene.background) for scene in scenes], device=device)
    return _Wanted(*torch.tensor(rows, device=device).unbind(-1), background)


class _Tracks(NamedTuple):
    """What clips show, in [0, 1]: of the object of each colour (6) and of the background, averaged over time."""

    color: torch.Tensor  # [B, 6]
    shape: torch.Tensor  # [B, 6, 4], of each shape
    direction: torch.Tensor  # [B, 6, 4], of each direction
    present: torch.Tensor  # [B, 6]: whether something of this colour is there, be it an object or not
    background: torch.Tensor  # [B, 4], of each background


def _match(tracks: _Tracks, wanted: _Wanted) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Scores [B] and parts, [B] each, under the best assignment of tracks to the caption's objects."""
    device = tracks.color.device

    def of(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:  # [B, MAX_OBJECTS, 6]
        return values.transpose(1, 2).gather(1, index[..., None].expand(-1, -1, len(COLORS)))

    same_color = wanted.color[..., None] == torch.arange(len(COLORS), device=device)
    background = tracks.background.gather(1, wanted.background[:, None])
    pairs = {
        "color": same_color * tracks.color[:, None],
        "shape": of(tracks.shape, wanted.shape),
        "direction": of(tracks.direction, wanted.direction),
        "background": background[..., None].expand(same_color.shape),
    }
    every = torch.stack(list(pairs.values()))
    match = every.mean(0) * (0.3 + 0.7 * (2 * every.amin(0)).clamp(max=1)) * wanted.real[..., None]

    maps = torch.tensor(list(itertools.permutations(range(len(COLORS)), MAX_OBJECTS)), device=device)
    total, best = match[:, torch.arange(MAX_OBJECTS, device=device), maps].sum(-1).max(1)
    chosen, count = maps[best][..., None], wanted.real.sum(1)
    parts = {name: (part.gather(2, chosen)[..., 0] * wanted.real).sum(1) / count for name, part in pairs.items()}
    # Objects that nobody asked for.
    return total / torch.maximum(count, tracks.present.sum(1)), parts


def _measure(videos: torch.Tensor) -> _Tracks:
    """Tracks of float videos [B, F, 3, H, W] in [0, 1]."""
    batch, frames, _, height, width = videos.shape
    # Contiguous for speed, and because `median` misreads a tensor that was expanded.
    pixels = videos.reshape(batch * frames, 3, height, width).contiguous()
    layers, distances = (values.unflatten(0, (batch, frames)) for values in _layers(pixels))
    area = layers.sum((3, 4))
    fraction = area / (height * width)
    plain = _find(layers, area)
    objects, visible = _complete_hidden(layers, area, plain)

    present = _present(objects, layers, area)
    seen = _ramp(visible, 0.3, 0.6)
    own, rest = distances[:, :, : len(COLORS)], distances[:, :, len(COLORS)]
    color = _closeness(own, tuple(COLORS)).diagonal(dim1=2, dim2=3)
    shape = (objects.overlap / 0.02).softmax(-1) * _ramp(objects.overlap, 0.5, 0.85)
    background = _closeness(rest, tuple(BACKGROUNDS)) * _ramp(fraction.sum(2), 0.7, 0.3)[..., None]
    return _Tracks(
        color=_over_time(present * color, seen),
        shape=_over_time(present[..., None] * shape, seen[..., None]),
        direction=_direction(objects.center, present, seen, height, width),
        present=_ramp(fraction, 0.015, 0.03).mean(1),
        background=background.mean(1),
    )


class _Objects(NamedTuple):
    """Of the object of each colour in each frame: overlap with each shape [B, F, 6, 4] in [0, 1], centre (x, y)
    [B, F, 6, 2] and area [B, F, 6] in pixels."""

    overlap: torch.Tensor
    center: torch.Tensor
    area: torch.Tensor


def _present(objects: _Objects, layers: torch.Tensor, area: torch.Tensor) -> torch.Tensor:
    """[B, F, 6]: how far there is one compact object of an object's size, in [0, 1], of the visible `area`."""
    pixels = layers[0, 0, 0].numel()
    fraction = objects.area / pixels
    size = _ramp(area / pixels, _LEAST, 2 * _LEAST) * _ramp(fraction, 0.01, 0.02) * _ramp(fraction, 0.3, 0.2)
    return size * _ramp(objects.overlap.amax(-1), 0.5, 0.7)


def _over_time(values: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Mean of values [B, F, ...] over the frames, each as far as it is `seen` [B, F, ...]."""
    return (values * seen).mean(1) / seen.mean(1).clamp(min=_SEEN)


def _layers(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Takes frames [N, 3, H, W] apart by colour: how far the object of each colour covers each pixel, [N, 6, H, W] in
    [0, 1]; and mean squared distances of the pixels of each layer, and of those of none, from all colours, [N, 7, 9].
    """
    count, _, height, width = pixels.shape
    # The background is what most pixels show; every 4th row and column is enough to tell.
    background = pixels[:, :, ::4, ::4].flatten(2).median(-1).values
    offset = pixels.flatten(2) - background[:, :, None]
    way = torch.tensor(list(COLORS.values()), device=pixels.device) - background[:, None]
    squared_way = way.square().sum(-1, keepdim=True)
    # A pixel between background and colour is at the edge of that colour, and of none that lies beside.
    cover = way @ offset
    share = cover * 2
    cover.div_(squared_way.clamp(min=0.01)).clamp_(0, 1)
    # Squared distance from the way, less what is the same for all colours.
    share = share.addcmul_(cover, squared_way, value=-1).mul_(cover).div_(0.02).softmax(1)
    # A colour that the background has is no object's.
    cover.mul_(share).mul_(_ramp(squared_way, 0.04, 0.16))
    # How much of the colour its pixels have; the squares keep the many faint pixels of the background out of it.
    coarse = cover.view(count, -1, height, width)[..., ::2, ::2].flatten(2)
    squares = coarse.square()
    contrast = (squares * coarse).sum(2, keepdim=True) / squares.sum(2, keepdim=True).clamp(min=1e-6)
    # The two soft ends are cut off.
    layers = cover.mul_(2 / contrast.clamp(min=0.6)).sub_(0.5).clamp_(0, 1)

    rest = (1 - layers.sum(1, keepdim=True)).clamp_(min=0)
    features = torch.cat([offset, offset.square().sum(1, keepdim=True), torch.ones_like(rest)], dim=1)
    sums = torch.cat([layers.square(), rest], dim=1) @ features.transpose(1, 2)
    mean = sums[..., :4] / sums[..., 4:].clamp(min=1e-6)
    # The distance is averaged, not the pixels: half red and half yellow is not orange.
    shift = background[:, None] - torch.tensor(list(_ALL_COLORS.values()), device=pixels.device)
    distances = mean[..., 3:] + 2 * mean[..., :3] @ shift.transpose(1, 2) + shift.square().sum(-1)[:, None]
    return layers.view(count, -1, height, width), distances.clamp(min=0)


def _closeness(distances: torch.Tensor, names: tuple[str, ...]) -> torch.Tensor:
    """[..., len(names)]: closeness to colours, against all colours, of mean squared distances [..., 9]."""
    columns = [list(_ALL_COLORS).index(name) for name in names]
    return (-distances / 0.04).softmax(-1)[..., columns] * _ramp(distances[..., columns].sqrt(), 0.5, 0.2)


def _find(layers: torch.Tensor, area: torch.Tensor) -> _Objects:
    """Objects of layers [B, F, 6, H, W] as they are; 0 where there is too little of a colour."""
    index = (area > _LEAST * layers[0, 0, 0].numel()).nonzero(as_tuple=True)
    masks, found = layers[index], area[index]
    center = centroid(masks)
    patch = patches(masks, center[:, None], found[:, None])
    fit = overlap(patch, found, found[:, None], torch.zeros_like(patch))
    return _Objects(*(v.new_zeros(*area.shape, *v.shape[1:]).index_put(index, v) for v in (fit, center, found)))


def _expected(objects: _Objects, sure: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where objects would be, [B, F, 6, 2], if they moved steadily through the frames in which they are found for
    `sure` [B, F, 6], and their area there, [B, F, 6]."""
    size = torch.tensor([width, height], device=sure.device)
    time = torch.arange(sure.shape[1], dtype=sure.dtype, device=sure.device)
    pair = sure[:, 1:] * sure[:, :-1]
    step = (pair[..., None] * shortest(objects.center.diff(dim=1), size)).sum(1)
    step = step / pair.sum(1).clamp(min=1e-6)[..., None]
    moved = time[:, None, None] * step[:, None]
    # Where an object would have begun, to go by the sure frames nearby; a circular mean.
    angle = (objects.center - moved) * (2 * torch.pi / size)
    nearby = (time - time[:, None]).abs().neg().exp()
    waves = sure[..., None] * torch.stack([angle.sin(), angle.cos()])
    begin = torch.atan2(*torch.einsum("fg,wbgkd->wbfkd", nearby, waves)) * (size / (2 * torch.pi))
    area = (sure * objects.area).sum(1) / sure.sum(1).clamp(min=1e-6)
    return begin + moved, area[:, None].expand_as(sure)


def _complete_hidden(layers: torch.Tensor, area: torch.Tensor, plain: _Objects) -> tuple[_Objects, torch.Tensor]:
    """Completes objects that others may hide in part, beginning where they are to be expected, and says which share of
    each is visible, [B, F, 6] in [0, 1]."""
    # What has a shape as it is, is hidden by nothing; what never has one, is not completed to one.
    whole_shape = _ramp(plain.overlap.amax(-1), 0.9, 0.95)
    sure = _present(plain, layers, area) * whole_shape
    evidence = sure.sum(1, keepdim=True).clamp(max=1).expand_as(sure)
    expected, expected_area = _expected(plain, sure, *layers.shape[3:])

    # Only what is also there when an object is seen can hide it: another colour in its place is no other object.
    there = _ramp(area / layers[0, 0, 0].numel(), _LEAST, 2 * _LEAST)
    hiding = 2 * torch.einsum("bfk,bfj->bkj", sure, there) / sure.sum(1).clamp(min=1e-6)[..., None]
    hiding = hiding.clamp(max=1) * (1 - torch.eye(len(COLORS), device=area.device))

    doubt = (1 - whole_shape) * evidence
    others = area.sum(2, keepdim=True) - area
    index = ((doubt > 0) & (others > 0)).nonzero(as_tuple=True)
    masks = layers[index]
    beside = (hiding[index[0], index[2], None] @ layers[index[:2]].flatten(2)).view_as(masks)
    seen, center, trust = area[index], plain.center[index], evidence[index]
    # The first shape stands for all.
    around = patches(beside, expected[index][:, None], expected_area[index][:, None])[:, 0]
    visible = 1 - trust * (around.clamp(0, 1) @ templates(area.device)[0] / SIDE**2)

    size = torch.tensor(layers.shape[:2:-1], device=area.device)
    shift = (trust[:, None] * shortest(expected[index] - center, size))[:, None].expand(-1, len(SHAPES), -1)
    whole = torch.maximum(seen, torch.lerp(seen, expected_area[index], trust))[:, None].expand(-1, len(SHAPES))
    fit, shift, whole = complete(masks, beside, center, seen, shift, whole)
    weight = (fit / 0.025).softmax(1)
    found = _Objects(fit, center + (weight[..., None] * shift).sum(1), (weight * whole).sum(1))

    changes = (doubt[index].view(-1, *(1,) * (new.dim() - 1)) * (new - old[index]) for new, old in zip(found, plain))
    objects = _Objects(*(old.index_put(index, change, accumulate=True) for old, change in zip(plain, changes)))
    present = _present(objects, layers, area)[index]
    visible = torch.lerp(visible, seen / objects.area[index].clamp(min=1), present)
    return objects, torch.ones_like(area).index_put(index, visible.clamp(0, 1))


def _direction(
    center: torch.Tensor, present: torch.Tensor, seen: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """[B, 6, 4]: share of the squared motion of centroids [B, F, 6, 2] that goes along each direction; 0 if still."""
    frames = center.shape[1]
    if frames == 1:
        return present.new_zeros(len(present), len(COLORS), len(DIRECTIONS))
    unit = min(height, width) / 64
    step = shortest(center.diff(dim=1), torch.tensor([width, height], device=center.device))
    length = step.norm(dim=-1)
    # A jump is no motion, and neither is what an object does that is not there, or not seen.
    seen, present = (torch.minimum(values[:, 1:], values[:, :-1]) for values in (seen, present))
    weight = seen * present * _ramp(length, 10 * unit, 6 * unit)
    along = weight[..., None] * (step @ torch.tensor(list(DIRECTIONS.values()), device=center.device).T)
    span = min(4, frames - 1)
    net, path, weight, seen = (values.unfold(1, span, 1).mean(-1) for values in (along, weight * length, weight, seen))
    share = net.clamp(min=0) / torch.maximum(path, 0.75 * unit * weight).clamp(min=1e-6)[..., None]
    return (share.square() * weight[..., None]).mean(1) / seen.mean(1).clamp(min=_SEEN)[..., None]
