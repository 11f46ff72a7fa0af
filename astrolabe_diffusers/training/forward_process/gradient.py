"""The gradient of a loss on predicted clean blocks, one pass's graph at a time."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import recursively_apply

from ...distributed.sharding import no_sync
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
        targets: what other policies make of a pass's frames, tensors `(B, C, F, h, w)` in whatever dicts or lists;
            called before the current policy's forward pass, because peft loses gradients if the adapter changes
            between that and the backward pass.
        losses: the values `(B,)` of a block, of the current policy's prediction `(B, C, n, h, w)`, the block's part
            of the targets, and its frames: `"loss"`, of which the gradient is taken, and others to be reported.
        model, samples_per_step, synchronize: as a trainer has and gets them.

    Returns:
        The sum over samples of each of the values.
    """
    sums = {}
    num_frames = sum(frames.stop - frames.start for frames in predictor.blocks)
    for frames in predictor.passes:
        given, values = targets(frames), {}
        is_last = synchronize and frames == predictor.passes[-1]
        # Inside no_sync go both passes: DDP decides in the forward pass what the backward pass does.
        with nullcontext() if is_last else no_sync(accelerator, model):
            prediction = predictor.predict(frames, forward=model)
            for block in (block for block in predictor.blocks if frames.start <= block.start < frames.stop):
                part = slice(block.start - frames.start, block.stop - frames.start)
                of_block = recursively_apply(lambda x: x[:, :, part], given)
                # Means over blocks of equal size, weighted by their share of the window, add up to the mean over it.
                share = (block.stop - block.start) / num_frames
                for name, value in losses(prediction[:, :, part], of_block, block).items():
                    values[name] = values.get(name, 0) + share * value.sum()
            accelerator.backward(values["loss"] / samples_per_step)
        predictor.advance(frames)
        for name, value in values.items():
            sums[name] = sums.get(name, 0) + value.detach()
    return sums
