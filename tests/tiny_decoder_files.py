"""Files in the format of TAEHV, with random weights, and a slow decoder of them: both from the published layout."""

import torch
import torch.nn.functional as F


# Multiples of eight, as the published ones: torch rounds others by how many frames are convolved together.
SMALL_WIDTHS = (24, 16, 8, 8)


def tiny_decoder_tensors(channels=4, widths=SMALL_WIDTHS, growths=(1, 2, 2), outputs=3, seed=0) -> dict:
    """Every tensor of a decoder is seen in its frames, which are not black or white."""
    shapes = {"decoder.1": (widths[0], channels, 3, True)}
    for stage, (width, wider, times) in enumerate(zip(widths, widths[1:], growths)):
        first = 3 + 6 * stage
        for block in range(first, first + 3):
            shapes |= {f"decoder.{block}.conv.{i}": (width, width * (2 if i == 0 else 1), 3, True) for i in (0, 2, 4)}
        shapes |= {f"decoder.{first + 4}.conv": (width * times, width, 1, False)}
        shapes |= {f"decoder.{first + 5}": (wider, width, 3, False)}
    shapes |= {"decoder.22": (outputs, widths[-1], 3, True)}
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, (rows, columns, size, has_bias) in shapes.items():
        deviation = (2 / (columns * size * size)) ** 0.5 * (0.1 if name == "decoder.22" else 0.8)
        tensors[f"{name}.weight"] = deviation * torch.randn(rows, columns, size, size, generator=generator)
        if has_bias:
            center = 0.5 if name == "decoder.22" else 0.0
            tensors[f"{name}.bias"] = center + 0.1 * torch.randn(rows, generator=generator)
    return tensors


def slow_frames(tensors: dict, latents: torch.Tensor, growths=(1, 2, 2), patch=1) -> torch.Tensor:
    """The frames `(3, F, H, W)` in [-1, 1] of one video's latents `(C, f, h, w)`, one layer and frame at a time."""

    def conv(name, frame):
        weight = tensors[f"{name}.weight"]
        bias = tensors.get(f"{name}.bias")
        return F.conv2d(frame[None], weight, bias, padding=weight.shape[-1] // 2)[0]

    def look_back(name, frame, past):
        hidden = conv(f"{name}.conv.0", torch.cat([frame, past])).relu()
        hidden = conv(f"{name}.conv.2", hidden).relu()
        return (conv(f"{name}.conv.4", hidden) + frame).relu()

    frames = [conv("decoder.1", 3 * torch.tanh(latent / 3)).relu() for latent in latents.unbind(1)]
    layer = 3
    for times in growths:
        for block in range(layer, layer + 3):
            pasts = [torch.zeros_like(frames[0]), *frames[:-1]]
            frames = [look_back(f"decoder.{block}", *pair) for pair in zip(frames, pasts)]
        frames = [frame.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2) for frame in frames]
        rows = times * len(frames[0])
        grow = tensors[f"decoder.{layer + 4}.conv.weight"][-rows:]
        frames = [part for frame in frames for part in F.conv2d(frame[None], grow)[0].chunk(times)]
        frames = [conv(f"decoder.{layer + 5}", frame) for frame in frames]
        layer += 6
    frames = [conv("decoder.22", frame.relu()).clamp(0, 1) for frame in frames]
    shown = torch.stack(frames, dim=1)[:, torch.tensor(growths).prod() - 1 :]
    if patch > 1:
        channels, count, height, width = shown.shape
        shown = shown.view(-1, patch, patch, count, height, width).permute(0, 3, 4, 1, 5, 2)
        shown = shown.reshape(-1, count, height * patch, width * patch)
    return 2 * shown - 1
