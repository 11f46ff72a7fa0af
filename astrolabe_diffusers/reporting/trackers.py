"""TensorBoard and Weights & Biases through accelerate, with what accelerate does not log: histograms and videos."""

import io
import logging
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers
from PIL import Image

from ..errors import UserError, one_line
from ..files.writing import writing
from .tracker_names import TRACKERS
from .videos import gif_bytes


logger = logging.getLogger(__name__)

# What leaves for wandb is what a run logs: not the command line, the paths and the repository it is started from, nor
# what is printed, which names folders and servers.
WANDB_SETTINGS = {"console": "off", "disable_git": True, "save_code": False, "x_disable_meta": True}


def tracker_names(report_to: str) -> list[str]:
    """The trackers that `report_to` stands for; a `UserError` if one is not installed."""
    available = [str(tracker) for tracker in get_available_trackers()]
    missing = [name for name in TRACKERS[report_to] if name not in available]
    if missing:
        raise UserError(f"report_to={report_to} needs the package {missing[0]}: pip install {missing[0]}.")
    return TRACKERS[report_to]


def start_trackers(
    accelerator: Accelerator, report_to: str, project: str, settings: dict, run_name: str, folder: Path, resume: bool
):
    """Open the trackers of a run, or go on with those of one that is resumed, in `folder`; `project` is what runs of
    one kind have in common, a folder's name too. [`closing_trackers`] closes them."""
    init_kwargs = {}
    if "wandb" in TRACKERS[report_to] and accelerator.is_main_process:
        id_file = folder / "wandb_id"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if not (resume and id_file.is_file()):
                id_file.write_text(uuid.uuid4().hex[:8])
        run = {"dir": folder, "name": run_name, "id": id_file.read_text(), "resume": "allow"}
        init_kwargs["wandb"] = run | {"settings": WANDB_SETTINGS}
    try:
        accelerator.init_trackers(project, config=settings, init_kwargs=init_kwargs)
    except Exception as error:  # each tracker has its own: no key, no network, ...
        raise UserError(f"report_to={report_to}: {one_line(error)}") from error


@contextmanager
def closing_trackers(accelerator: Accelerator) -> Iterator[None]:
    """Trackers that are opened inside are closed at the end. One that cannot be closed, without network for example,
    is no reason for the run to fail."""
    before = threading.excepthook

    def hook(arguments):
        # What TensorBoard's thread cannot write, its next call raises in the run.
        if not type(arguments.thread).__module__.startswith("tensorboard."):
            before(arguments)

    threading.excepthook = hook
    level = logging.DEBUG  # after an error everything is said
    try:
        yield
        level = logging.WARNING
    finally:
        while accelerator.trackers:
            tracker = accelerator.trackers.pop()
            try:
                tracker.finish()
            except Exception as error:
                logger.log(level, "%s was not closed: %s", tracker.name, one_line(error))
        threading.excepthook = before


def log_numbers(accelerator: Accelerator, values: dict[str, float], step: int):
    _log(accelerator, lambda tracker: tracker.log(values, step=step))


def log_distributions(accelerator: Accelerator, values: dict[str, torch.Tensor], step: int):
    """Histograms of the finite values of every tensor `(N,)`, by its tag. For the main process."""

    def log(tracker: GeneralTracker):
        for tag, tensor in values.items():
            finite = tensor[tensor.isfinite()]
            if len(finite) and tracker.name == "wandb":
                import wandb

                tracker.tracker.log({tag: wandb.Histogram(finite.numpy())}, step=step)
            elif len(finite):
                tracker.tracker.add_histogram(tag, finite, step)

    _log(accelerator, log)


def log_video(accelerator: Accelerator, tag: str, images: Sequence[Image.Image], frame_rate: int, step: int):
    """A video as an animated GIF, which browsers play and which needs no moviepy. For the main process."""
    gif, (width, height) = gif_bytes(images, frame_rate), images[0].size

    def log(tracker: GeneralTracker):
        if tracker.name == "wandb":
            import wandb

            tracker.tracker.log({tag: wandb.Video(io.BytesIO(gif), format="gif")}, step=step)
        else:
            from tensorboard.compat.proto.summary_pb2 import Summary

            image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=gif)
            tracker.tracker.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)

    _log(accelerator, log)


def _log(accelerator: Accelerator, log: Callable[[GeneralTracker], None]):
    """Calls `log` for every tracker. TensorBoard writes in a thread, and only says at a later call that it could not.
    An error of wandb, which may be an `OSError` too, is mostly one of the network."""
    for tracker in accelerator.trackers:
        try:
            log(tracker)
        except Exception as error:
            if not isinstance(error, OSError) and not type(error).__module__.startswith("wandb."):
                raise
            problem = {"tensorboard": f"cannot write {accelerator.logging_dir}", "wandb": "report_to=wandb"}
            raise UserError(f"{problem[tracker.name]}: {one_line(error)}") from error
