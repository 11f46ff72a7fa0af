"""What the backward pass computes again of a block, in place of what the forward pass would have to keep."""

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts


# Their outputs are kept: a hundredth of a block's activations, and of a long video most of its time.
_ATTENTION = [
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
]

# Functions for `enable_gradient_checkpointing`, by the setting.
CHECKPOINTING = {
    "full": partial(checkpoint, use_reentrant=False),
    "selective": partial(
        checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, _ATTENTION)
    ),
}
