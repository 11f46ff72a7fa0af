"""Code of users' that a run calls."""

from pathlib import Path
from typing import Any


class TrainerCallback:
    """What a run calls at its stages; a subclass overrides what it needs.

    Every process calls it, with the same arguments but for `results`, which only the main process has.
    """

    def on_epoch_end(self, trainer, metrics: dict[str, float]) -> dict[str, float] | None:
        """After the update, with the metrics of the epoch by name; returns further ones, numbers, which are logged
        with them."""

    def on_evaluate(self, trainer, evaluation):
        """After the held-out videos are scored, with their [`Evaluation`]."""

    def on_checkpoint(self, trainer, path: Path):
        """After a checkpoint is written to this folder."""

    def on_train_end(self, trainer, results: dict[str, Any]):
        """After everything is written, with what `train` returns."""
