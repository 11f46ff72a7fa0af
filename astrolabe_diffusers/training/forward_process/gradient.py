"""The gradient of a loss on predicted clean blocks, one block's graph at a time."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar

import torch
from accelerate import Accelerator

from .predictors import BlockwisePredictor


T = TypeVar("T")


def backward_by_block(
    accelerator: Accelerator,
    model: torch.nn.Module,
    predictor: BlockwisePredictor,
    targets: Callable[[slice], T],
    losses: Callable[[torch.Tensor, T, slice], dict[str, torch.Tensor]],
    samples_per_step: int,
    synchronize: bool,
) -> dict[str, torch.Tensor]:
    """Add a batch's part of the gradient of the mean loss to the current policy's parameters.

    Args:
        targets: what other policies make of a block; called before the current policy's forward pass, because peft
            loses gradients if the adapter changes between that and the backward pass.
        losses: the values `(B,)` of the current policy's prediction `(B, C, n, h, w)`, the targets and the block's
            frames: `"loss"`, of which the gradient is taken, and others to be reported.
        model, samples_per_step, synchronize: as a trainer has and gets them.

    Returns:
        The sum over samples of each of the values.
    """
    sums = {}
    num_frames = sum(frames.stop - frames.start for frames in predictor.blocks)
    for frames in predictor.blocks:
        given = targets(frames)
        is_last = synchronize and frames == predictor.blocks[-1]
        # Inside no_sync go both passes: DDP decides in the forward pass what the backward pass does.
        with nullcontext() if is_last else accelerator.no_sync(model):
            prediction = predictor.predict(frames, forward=model)
            values = losses(prediction, given, frames)
            # Means over blocks of equal size, weighted by their share of the window, add up to the mean over it.
            share = (frames.stop - frames.start) / num_frames
            accelerator.backward(values["loss"].sum() * share / samples_per_step)
        predictor.advance(frames)
        for name, value in values.items():
            sums[name] = sums.get(name, 0) + share * value.detach().sum()
    return sums
