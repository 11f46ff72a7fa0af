"""The world of the embedded model, one coloured shape that moves, and a reward for how well a clip fits a caption."""

import re
from functools import cache

import torch

from ..registry import register_reward
from ..reward import Reward, RewardOutput


# RGB in [0, 1]. Any two differ by at least 0.45 (Euclidean), an object and its background by at least 0.57.
COLORS = {
    "red": (0.90, 0.05, 0.10),
    "green": (0.05, 0.70, 0.20),
    "blue": (0.10, 0.20, 0.95),
    "yellow": (1.00, 0.95, 0.10),
    "purple": (0.70, 0.00, 0.85),
    "orange": (1.00, 0.50, 0.00),
}
SHAPES = ("circle", "square", "triangle", "cross")
BACKGROUNDS = {"black": (0.0, 0.0, 0.0), "white": (1.0, 1.0, 1.0), "gray": (0.5, 0.5, 0.5), "blue": COLORS["blue"]}
_ALL_COLORS = {**COLORS, **BACKGROUNDS}
# Unit vectors (x, y) of the image plane: x to the right, y down.
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}

# The attributes of a caption, in the order in which every index tensor holds them.
ATTRIBUTES = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "background": tuple(BACKGROUNDS),
    "direction": tuple(DIRECTIONS),
}


def caption(color: str, shape: str, background: str, direction: str) -> str:
    return f"a {color} {shape} moves {direction} on a {background} background"


_CAPTION = re.compile(
    caption(**{name: f"(?P<{name}>{'|'.join(values)})" for name, values in ATTRIBUTES.items()}), re.IGNORECASE
)


def parse_caption(prompt: str) -> dict[str, str]:
    """The value that a caption names of each of `ATTRIBUTES`; `ValueError` if it is none of tiny_shapes."""
    match = _CAPTION.fullmatch(prompt.strip().rstrip("."))
    if match is None:
        choices = "; ".join(f"{name} {' '.join(values)}" for name, values in ATTRIBUTES.items())
        form = caption("COLOR", "SHAPE", "BACKGROUND", "DIRECTION")
        raise ValueError(f"{prompt!r} is no tiny_shapes caption; the form is {form!r} with {choices}.")
    return {name: match[name].lower() for name in ATTRIBUTES}


def _offsets(size: int, position: torch.Tensor) -> torch.Tensor:
    """[..., size]: how far the pixels of an axis whose ends meet are from each `position` [...]."""
    pixels = torch.arange(size, dtype=position.dtype, device=position.device) + 0.5
    return _shortest(pixels - position[..., None], size)


def _shortest(way: torch.Tensor, size: int | torch.Tensor) -> torch.Tensor:
    return (way + size / 2).remainder(size) - size / 2


def shape_mask(
    shape: torch.Tensor, center: torch.Tensor, radius: torch.Tensor, height: int = 64, width: int = 64
) -> torch.Tensor:
    """
    Draws shapes on a plane whose opposite borders meet: [N, height, width] in [0, 1], antialiased.

    Args:
        shape: long tensor [N], indices into `SHAPES`.
        center: float tensor [N, 2], the centroid (x, y) in pixels; pixel i covers [i, i + 1).
        radius: float tensor [N] in pixels: of the circle; the other shapes have about the same area.
    """
    x, y = _offsets(width, center[:, 0])[:, None, :], _offsets(height, center[:, 1])[:, :, None]
    ax, ay, r = x.abs(), y.abs(), radius[:, None, None]
    # Signed distance to the outline, negative inside.
    distances = (
        (x.square() + y.square()).sqrt() - r,
        torch.maximum(ax, ay) - 0.89 * r,
        # Equilateral, tip up; the circumradius is twice the distance of a side from the centroid.
        torch.maximum(y, 0.75**0.5 * ax - 0.5 * y) - 0.7 * r,
        torch.minimum(torch.maximum(ax - 1.15 * r, ay - 0.38 * r), torch.maximum(ax - 0.38 * r, ay - 1.15 * r)),
    )
    shape = shape[:, None, None]
    distance = distances[0]
    for index in range(1, len(SHAPES)):
        distance = torch.where(shape == index, distances[index], distance)
    return (0.5 - distance).clamp_(0, 1)


def _ramp(x: torch.Tensor, start: float, end: float) -> torch.Tensor:
    """0 up to `start`, 1 from `end` on, linear between; `start` may be the larger one."""
    return ((x - start) / (end - start)).clamp(0, 1)


# Side of the patch to which an object is brought before it is compared with the templates, and the side of a square
# of the object's area inside it. The patch is large enough for the widest shape.
_PATCH, _SIDE = 28, 14


@cache
def _templates(device: torch.device) -> torch.Tensor:
    """[len(SHAPES), _PATCH**2]: every shape at the area _SIDE**2, centred."""
    fine = 8
    index = torch.arange(len(SHAPES))
    center = torch.full((len(SHAPES), 2), _PATCH * fine / 2)
    radius = torch.full((len(SHAPES),), _SIDE * fine / 2.0)
    for _ in range(5):
        masks = shape_mask(index, center, radius, _PATCH * fine, _PATCH * fine)
        radius *= _SIDE * fine / masks.sum((1, 2)).sqrt()
    return torch.nn.functional.avg_pool2d(masks[:, None], fine).flatten(1).to(device)


def _resample(size: int, center: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[N, _PATCH, size]: linear interpolation along one axis that wraps around, `scale` pixels a step."""
    steps = torch.arange(_PATCH, dtype=center.dtype, device=center.device) + 0.5 - _PATCH / 2
    offset = _offsets(size, center[:, None] + steps * scale[:, None])
    reach = scale.clamp(min=1.0)[:, None, None]
    weight = (1 - offset.abs() / reach).clamp_(min=0)
    return weight / weight.sum(-1, keepdim=True)


def _circular_centroid(profile: torch.Tensor) -> torch.Tensor:
    """Centroid [N] in pixels of a profile [N, size] whose ends meet."""
    size = profile.shape[1]
    pixels = torch.arange(size, dtype=profile.dtype, device=profile.device) + 0.5
    angle = pixels * (2 * torch.pi / size)
    center = torch.atan2(profile @ angle.sin(), profile @ angle.cos()) * (size / (2 * torch.pi))
    # The circular mean of a lopsided profile is not its mean: one step to the mean around it.
    return center + (profile * _offsets(size, center)).sum(1) / profile.sum(1).clamp(min=1e-6)


@register_reward("tiny_shapes_prompt_match")
class TinyShapesPromptMatch(Reward):
    """
    How well a clip shows what its caption says, measured from the pixels. The score is the mean of four parts, each in
    [0, 1], continuous, and logged on its own:

    - `color`: how close the object's pixels are to the colour, against all other colours of this world.
    - `shape`: overlap of the object with the shape's outline at the object's place and size, against the other shapes.
    - `background`: how close the pixels beside the object are to the background colour.
    - `direction`: the share of the motion that goes the right way.

    Each is measured frame by frame (the direction over a few frames) and averaged, so a clip that is right half of the
    time gets half. Colour, shape and direction count only as far as there is one object: something that stands out
    from the background, covers 2.5 to 20 % of the frame and is compact. A prompt that is no caption raises
    `ValueError`.
    """

    def score(self, videos, prompts, metadata=None):
        names = [parse_caption(prompt) for prompt in prompts]
        wanted = {
            name: torch.tensor([values.index(n[name]) for n in names], device=videos.device)
            for name, values in ATTRIBUTES.items()
        }
        parts = {name: part.float().cpu() for name, part in measure(videos.float(), wanted).items()}
        return RewardOutput(torch.stack(list(parts.values())).mean(0), parts)


def measure(videos: torch.Tensor, wanted: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The four parts of the reward, [B] each, of float videos [B, F, 3, H, W] in [0, 1]; `wanted` has for each
    attribute a long tensor [B] of indices into `ATTRIBUTES[name]`."""
    batch, frames, _, height, width = videos.shape
    wanted = {name: index[:, None].expand(batch, frames).flatten() for name, index in wanted.items()}
    # Contiguous for speed, and because `median` misreads a tensor that was expanded.
    pixels = videos.reshape(batch * frames, 3, height, width).contiguous()

    # The background is what most pixels show; every 4th row and column is enough to tell.
    background = pixels[:, :, ::4, ::4].flatten(2).median(-1).values
    pixels = pixels.flatten(2)
    squared = torch.zeros_like(pixels[:, 0])
    for channel in range(3):
        squared.add_((pixels[:, channel] - background[:, channel, None]).square_())
    distance = squared.sqrt()
    # Mean distance of the object's pixels: the squares keep the many near ones of the background out of it.
    contrast = (squared[:, None] @ distance[:, :, None]).flatten() / squared.sum(1).clamp(min=1e-6)
    # Coverage of a pixel by the object, its two soft ends cut off.
    mask = distance.mul_(2 / contrast.clamp(min=0.2)[:, None]).sub_(0.5).clamp_(0, 1)
    area = mask.sum(1)

    grid = mask.view(-1, height, width)
    center = torch.stack([_circular_centroid(grid.sum(1)), _circular_centroid(grid.sum(2))], dim=1)
    overlap = _template_overlap(grid, center, area)

    fraction = area / (height * width)
    one_object = (
        _ramp(contrast, 0.15, 0.35)
        * _ramp(fraction, 0.01, 0.025)
        * _ramp(fraction, 0.3, 0.2)
        * _ramp(overlap.max(1).values, 0.5, 0.7)
    )

    target = overlap.gather(1, wanted["shape"][:, None])[:, 0]
    among_shapes = (overlap / 0.025).softmax(1).gather(1, wanted["shape"][:, None])[:, 0]
    weights = torch.stack([mask.square(), 1 - mask], dim=1)
    of_object, of_rest = _color_distances(pixels, squared, background, weights).unbind(1)
    parts = {
        "color": one_object * _color_match(of_object, COLORS, wanted["color"]),
        "shape": one_object * among_shapes * _ramp(target, 0.5, 0.85),
        "background": _ramp(fraction, 0.7, 0.3) * _color_match(of_rest, BACKGROUNDS, wanted["background"]),
    }
    parts = {name: part.view(batch, frames).mean(1) for name, part in parts.items()}
    vector = torch.tensor(list(DIRECTIONS.values()), device=videos.device)[wanted["direction"][::frames]]
    parts["direction"] = _direction_match(
        center.view(batch, frames, 2), one_object.view(batch, frames), vector, height, width
    )
    return parts


def _color_distances(
    pixels: torch.Tensor, squared: torch.Tensor, background: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """[N, W, 9]: mean squared distance of the pixels [N, 3, P] from all colours under each of the weights [N, W, P];
    `squared` [N, P] is that from `background` [N, 3]. The distance is averaged, not the pixels: half red and half
    yellow is not orange."""
    colors = torch.tensor(list(_ALL_COLORS.values()), device=pixels.device)
    total = weights.sum(-1, keepdim=True).clamp(min=1e-6)
    shift = background[:, None] - colors
    offset = weights @ pixels.transpose(1, 2) / total - background[:, None]
    spread = weights @ squared[:, :, None] / total
    return (spread + 2 * offset @ shift.transpose(1, 2) + shift.square().sum(-1)[:, None]).clamp_(min=0)


def _color_match(distances: torch.Tensor, palette: dict, wanted: torch.Tensor) -> torch.Tensor:
    """[N]: closeness to colour `wanted` [N] of the palette, against all colours, of mean squared distances [N, 9]."""
    column = torch.tensor([list(_ALL_COLORS).index(name) for name in palette], device=wanted.device)[wanted][:, None]
    among_colors = (-distances / 0.04).softmax(1).gather(1, column)[:, 0]
    return among_colors * _ramp(distances.gather(1, column)[:, 0].sqrt(), 0.5, 0.2)


def _template_overlap(mask: torch.Tensor, center: torch.Tensor, area: torch.Tensor) -> torch.Tensor:
    """[N, len(SHAPES)]: intersection over union of masks [N, H, W] with each shape of the same centroid and area."""
    height, width = mask.shape[1:]
    scale = area.clamp(min=4.0).sqrt() / _SIDE
    rows, columns = _resample(height, center[:, 1], scale), _resample(width, center[:, 0], scale)
    patch = torch.bmm(torch.bmm(rows, mask), columns.transpose(1, 2)).flatten(1)
    templates = _templates(mask.device)
    shared = patch @ templates.T
    # What lies outside the patch belongs to the union too.
    outside = (area / scale.square() - patch.sum(1)).clamp(min=0)
    return shared / (patch.square().sum(1)[:, None] + templates.square().sum(1) - shared + outside[:, None])


def _direction_match(
    center: torch.Tensor, present: torch.Tensor, vector: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """[B]: share of the squared motion of centroids [B, F, 2] that goes along `vector` [B, 2]; 0 if still."""
    frames = center.shape[1]
    if frames == 1:
        return torch.zeros_like(present[:, 0])
    unit = min(height, width) / 64
    size = torch.tensor([width, height], device=center.device)
    step = _shortest(center[:, 1:] - center[:, :-1], size)
    length = step.norm(dim=-1)
    # A jump is no motion, and neither is what an object does that is not there.
    weight = torch.minimum(present[:, 1:], present[:, :-1]) * _ramp(length, 10 * unit, 6 * unit)
    along = weight * (step * vector[:, None]).sum(-1)
    span = min(4, frames - 1)
    net, path, present = (values.unfold(1, span, 1).mean(-1) for values in (along, weight * length, weight))
    # Below 0.75 pixels a frame (of 64) the motion is too slow to count in full.
    share = net.clamp(min=0) / torch.maximum(path, 0.75 * unit * present).clamp(min=1e-6)
    return (share.square() * present).mean(1)
