"""Algorithms by name."""

import importlib
from typing import TYPE_CHECKING

from ..errors import UserError, close_matches, is_missing


if TYPE_CHECKING:
    from .config import OnlineConfig
    from .trainer import OnlineTrainer

# Trainer and settings, which need no torch; a module is only imported when its algorithm is asked for.
ALGORITHMS = {
    "nft": ("astrolabe_diffusers.training.nft:NFTTrainer", "astrolabe_diffusers.training.nft:NFTConfig"),
    "awm": ("astrolabe_diffusers.training.awm:AWMTrainer", "astrolabe_diffusers.training.awm:AWMConfig"),
    "cm_grpo": (
        "astrolabe_diffusers.training.cm_grpo:CMGRPOTrainer",
        "astrolabe_diffusers.training.cm_grpo:CMGRPOConfig",
    ),
}


def get_algorithm(name: str) -> type["OnlineTrainer"]:
    """The trainer that a name of `ALGORITHMS` means, or "package.module:Class" of one's own; a
    [`UserError`] if there is none."""
    trainer = _load(name, ALGORITHMS[name.lower()][0] if name.lower() in ALGORITHMS else name)
    if not hasattr(trainer, "config_class"):
        module, _, attribute = name.rpartition(":")
        raise UserError(f"algorithm {name!r}: {module} has no OnlineTrainer {attribute}.")
    return trainer


def get_config_class(name: str) -> type["OnlineConfig"]:
    """The settings' class of the algorithm that [`get_algorithm`] finds by this name."""
    if name.lower() in ALGORITHMS:
        return _load(name, ALGORITHMS[name.lower()][1])
    return get_algorithm(name).config_class


def algorithm_name(trainer: type["OnlineTrainer"]) -> str:
    """The name by which [`get_algorithm`] finds a trainer."""
    path = f"{trainer.__module__}:{trainer.__qualname__}"
    return next((name for name in ALGORITHMS if get_algorithm(name) is trainer), path)


def _load(name: str, path: str) -> type | None:
    module, _, attribute = path.rpartition(":")
    if not module:
        raise UserError(
            f"unknown algorithm {name!r}{close_matches(name, ALGORITHMS)}; known: {', '.join(ALGORITHMS)}, or "
            "package.module:Class of an OnlineTrainer of your own."
        )
    try:
        return getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        if not is_missing(module, error):
            raise
        raise UserError(f"algorithm {name!r}: no module {error.name} (is its folder on PYTHONPATH?).") from None
