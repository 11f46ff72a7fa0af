"""Algorithms by name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ..errors import UserError
from ..spelling import close_matches


if TYPE_CHECKING:
    from .trainer import OnlineTrainer

# Trainer classes; the module is only imported when its algorithm is asked for.
ALGORITHMS = {
    "nft": "astrolabe_diffusers.training.nft:NFTTrainer",
    "awm": "astrolabe_diffusers.training.awm:AWMTrainer",
}


def get_algorithm(name: str) -> type[OnlineTrainer]:
    """The trainer that a name of `ALGORITHMS` means, or "package.module:Class" of one's own.

    Raises:
        UserError: there is none of that name.
    """
    module, _, attribute = ALGORITHMS.get(name.lower(), name).rpartition(":")
    if not module:
        raise UserError(
            f"unknown algorithm {name!r}{close_matches(name, ALGORITHMS)}; known: {', '.join(ALGORITHMS)}, or "
            "package.module:Class of an OnlineTrainer of your own."
        )
    try:
        trainer = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        # A module that exists but misses one of its own imports must say so itself.
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise UserError(f"algorithm {name!r}: no module {error.name} (is its folder on PYTHONPATH?).") from None
    if not hasattr(trainer, "config_class"):
        raise UserError(f"algorithm {name!r}: {module} has no OnlineTrainer {attribute}.")
    return trainer
