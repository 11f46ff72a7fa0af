"""Whether a run compiles the blocks of the transformer."""

import logging

import torch

from ...distributed.sharding import is_sharded
from ...errors import UserError, name_exception
from ...models.contract import packs_clips
from .config import BlockwiseConfig


logger = logging.getLogger(__name__)


def compiles_blocks(config: BlockwiseConfig, transformer, num_frames: int, device: torch.device) -> bool:
    """Whether blocks are compiled in training on this device, with a window of `num_frames` latent frames.

    As `config.compile` says. If it says nothing, on CUDA where whole videos are trained, in one pass or in passes of
    one block, all that runs in it is ours and none of it in shards, and torch.compile works. It hangs on nothing but
    settings, model and machine, so that a run that is resumed decides the same.

    Raises:
        UserError: `config.compile` is true, and torch.compile would have to compile every pass for itself, as each
            begins with another frame.
    """
    is_window = config.window_size is not None
    blocks = num_frames // transformer.config.num_frames_per_block
    one_pass = not is_window and (config.context != "clean" or blocks <= config.num_pass_blocks)
    if config.compile is None:
        # What a user puts in the place of ours may be nothing that can be traced; in shards nobody has measured it.
        one_kind = one_pass or (config.num_pass_blocks == 1 and not is_window)
        suits = one_kind and packs_clips(transformer) and not is_sharded()
        return device.type == "cuda" and suits and compiler_works(device)
    if not config.compile:
        return False
    if config.context == "clean" and config.num_pass_blocks > 1 and not one_pass:
        raise UserError("compile needs blocks_per_pass=1 where a video is trained in a window or in several passes.")
    if config.context == "clean_grad" and is_window:
        raise UserError("compile needs context=clean and blocks_per_pass=1 where a window is trained.")
    return True


def compiler_works(device: torch.device) -> bool:
    """Whether torch.compile can be used on this device; if not, what is wrong is logged."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever a compiler that is missing, or a GPU that is too old, raises
        logger.warning("blocks are not compiled, for torch.compile fails: %s", name_exception(error))
        return False
    return True
