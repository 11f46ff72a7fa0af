"""How objects of the tiny_shapes world are compared with the outlines of its shapes, and completed where hidden."""

from functools import cache

import torch

from .tiny_shapes_world import SHAPES, offsets, shape_mask


# Side of the patch to which an object is brought before it is compared with the templates, and the side of a square
# of the object's area inside it. The patch is large enough for the widest shape.
PATCH, SIDE = 28, 14
# Steps in which an object that another one hides in part is completed.
_STEPS = 6


@cache
def templates(device: torch.device) -> torch.Tensor:
    """[len(SHAPES), PATCH**2]: every shape at the area SIDE**2, centred."""
    fine = 8
    index = torch.arange(len(SHAPES))
    center = torch.full((len(SHAPES), 2), PATCH * fine / 2)
    radius = torch.full((len(SHAPES),), SIDE * fine / 2.0)
    for _ in range(5):
        masks = shape_mask(index, center, radius, PATCH * fine, PATCH * fine)
        radius *= SIDE * fine / masks.sum((1, 2)).sqrt()
    return torch.nn.functional.avg_pool2d(masks[:, None], fine).flatten(1).to(device)


def _steps(device: torch.device) -> torch.Tensor:
    """[PATCH]: places along an axis of a patch, from its middle."""
    return torch.arange(PATCH, device=device) + 0.5 - PATCH / 2


def patches(masks: torch.Tensor, center: torch.Tensor, area: torch.Tensor) -> torch.Tensor:
    """[N, K, PATCH**2]: masks [N, H, W] around K centres [N, K, 2] each, by linear interpolation, such that an object
    of the area [N, K] has that of the templates."""
    scale = area.clamp(min=4.0).sqrt()[..., None] / SIDE

    def weights(size: int, position: torch.Tensor) -> torch.Tensor:  # [N, K, PATCH, size]
        place = (position[..., None] + _steps(masks.device) * scale).remainder(size)
        distance = (torch.arange(size, device=masks.device) + 0.5 - place[..., None]).abs_()
        # The shorter way, across the border or not.
        distance = torch.minimum(distance, size - distance)
        weight = distance.div_(scale.clamp(min=1.0)[..., None]).neg_().add_(1).clamp_(min=0)
        return weight.div_(weight.sum(-1, keepdim=True))

    rows, columns = weights(masks.shape[1], center[..., 1]), weights(masks.shape[2], center[..., 0])
    half = (rows.flatten(1, 2) @ masks).unflatten(1, rows.shape[1:3])
    return (half @ columns.transpose(2, 3)).flatten(2)


def centroid(masks: torch.Tensor) -> torch.Tensor:
    """Centroid (x, y) [N, 2] in pixels of masks [N, H, W] on a plane whose opposite borders meet."""

    def circular(profile: torch.Tensor) -> torch.Tensor:
        size = profile.shape[1]
        angle = (torch.arange(size, device=profile.device) + 0.5) * (2 * torch.pi / size)
        center = torch.atan2(profile @ angle.sin(), profile @ angle.cos()) * (size / (2 * torch.pi))
        # The circular mean of a lopsided profile is not its mean: one step to the mean around it.
        return center + (profile * offsets(size, center)).sum(1) / profile.sum(1).clamp(min=1e-6)

    return torch.stack([circular(masks.sum(1)), circular(masks.sum(2))], dim=1)


def overlap(patch: torch.Tensor, area: torch.Tensor, whole: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """[N, 4]: intersection over union with each shape of objects of visible `area` [N], as patches [N, K, P]
    scaled by the `whole` area [N, K]. What is `hidden` [N, K, P] of a shape counts little: enough that of two shapes
    that fit, the one with less to imagine wins."""
    outlines = templates(patch.device)
    open_part = outlines * (1 - hidden)
    shared = (patch * open_part).sum(2)
    # What lies outside the patch belongs to the union too.
    outside = (area[:, None] * SIDE**2 / whole.clamp(min=4.0) - patch.sum(2)).clamp(min=0)
    imagined = 0.1 * (outlines * hidden).sum(2)
    return shared / (patch.square().sum(2) + open_part.square().sum(2) - shared + outside + imagined)


def complete(
    masks: torch.Tensor,
    beside: torch.Tensor,
    center: torch.Tensor,
    seen: torch.Tensor,
    shift: torch.Tensor,
    whole: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Completes objects in part hidden under each shape: the hidden part is where the shape, at the place and of the size
    of what is seen and hidden so far, lies behind other objects.

    Args:
        masks, beside: [N, H, W], what is seen of the object, and other objects that may hide it.
        center, seen: [N, 2] and [N], centroid and area of `masks` in pixels.
        shift, whole: [N, 4, 2] and [N, 4], a first guess of the whole's centre, from `center`, and of its area.

    Returns:
        The overlap [N, 4] with each shape, and better guesses of `shift` and `whole`.
    """
    steps, outlines = _steps(masks.device), templates(masks.device)
    for _ in range(_STEPS):
        hidden = (patches(beside, center[:, None] + shift, whole) * outlines).unflatten(2, (PATCH, PATCH))
        scale = whole.clamp(min=4.0).sqrt() / SIDE
        amount = hidden.sum((2, 3)) * scale.square()
        moment = torch.stack([hidden.sum(2) @ steps, hidden.sum(3) @ steps], dim=-1) * scale[..., None] ** 3
        whole = seen[:, None] + amount
        # The visible part stays where it is, at shift 0.
        shift = (moment + shift * amount[..., None]) / whole[..., None].clamp(min=1)
    place = center[:, None] + shift
    return overlap(patches(masks, place, whole), seen, whole, patches(beside, place, whole)), shift, whole
