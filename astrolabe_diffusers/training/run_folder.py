"""The output folder of a training run: what it writes there, and when it may."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from ..files.output_folder import RESULTS_NAME, RunFolder
from ..reporting import hub
from .config import OnlineConfig


# All that a training run writes beside what its trackers do, as patterns.
TRAINING_FILES = (
    "config.yaml",
    *hub.FILES,
    RESULTS_NAME,
    "best/*",
    "eval_videos/step-*",
    "checkpoints/checkpoint-*",
)


@contextmanager
def open_training_folder(config: OnlineConfig) -> Iterator[RunFolder]:
    """As a context, the locked folder of a training run. Before anything is loaded; it changes nothing that is there.

    Raises:
        UserError: a run is writing to it; or it holds a run that this one does not resume, or files of others that it
            would write over, and `overwrite_output_dir` is not set.
    """
    with RunFolder(config.output_dir, "training", TRAINING_FILES) as folder:
        if folder.present() and not config.overwrite_output_dir:
            if not (folder.has_begun() or _is_older_run(folder.path)):
                folder.refuse_files_of_others("--overwrite_output_dir true")
            if not _resumes(config):
                state = "a finished run" if (folder.path / RESULTS_NAME).exists() else "a run that has not ended"
                raise UserError(
                    f"{folder.path} holds {state}: --resume_from_checkpoint latest goes on with it, another "
                    "--output_dir begins anew there, and --overwrite_output_dir true begins anew here."
                )
        yield folder


def _is_older_run(path: Path) -> bool:
    """Whether a run of a version without this file wrote here, or the folder was copied without hidden files."""
    logs = all((path / name).is_file() for name in ("config.yaml", "eval.jsonl"))
    return logs or any(path.glob("checkpoints/checkpoint-*/trainer_state.json"))


def _resumes(config: OnlineConfig) -> bool:
    """Whether a run goes on with the one in its output folder, not with one elsewhere."""
    name, checkpoints = config.resume_from_checkpoint, Path(config.output_dir) / "checkpoints"
    if name is None or name == "latest":
        return name is not None
    return not Path(name).is_dir() or Path(name).resolve().parent == checkpoints.resolve()
