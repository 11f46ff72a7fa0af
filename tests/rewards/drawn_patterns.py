"""Small videos made from formulas: the same in every library version."""

import torch


def patterns(number=2, frames=12, height=90, width=160):
    """float [number, frames, 3, height, width]: waves that move, each video with its own."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return torch.stack([
        torch.stack([
            torch.stack([
                (torch.sin(9 * x * (k + 1) + 0.4 * f) + 1) / 2,
                (torch.cos(7 * y + 0.2 * k * f) + 1) / 2,
                (x * y * (k + 0.5)).clamp(0, 1),
            ])
            for f in range(frames)
        ])
        for k in range(number)
    ])  # fmt: skip
