"""accelerate's settings, checked."""

from contextlib import AbstractContextManager

from ..errors import UserError, as_user_error


PRECISIONS = ("no", "bf16")


def accelerate_settings() -> AbstractContextManager:
    """What accelerate finds wrong inside with its own settings, which come from its launcher, is told in one line."""
    return as_user_error("accelerate's settings, in its configuration file or the environment")


def check_precision(accelerator):
    """Of an `Accelerator`, which takes a word that it does not know for "no", and whose fp16 would need a gradient
    scaler."""
    if accelerator.mixed_precision not in PRECISIONS:
        raise UserError(
            f"mixed_precision must be one of {', '.join(PRECISIONS)}, not {accelerator.mixed_precision}, as "
            "accelerate's configuration file or ACCELERATE_MIXED_PRECISION has it."
        )
