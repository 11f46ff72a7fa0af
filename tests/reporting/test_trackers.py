import json
import math
import struct

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.reporting import trackers as trackers_module
from astrolabe_diffusers.reporting.trackers import (
    log_distributions,
    log_numbers,
    log_video,
    start_trackers,
    tracker_names,
)
from astrolabe_diffusers.reporting.videos import gif_bytes, video_images


SCORES = torch.tensor([0.0, 1.0, 1.0, math.nan])
FRAMES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def run_trackers(report_to, folder, resume=False):
    """Opens the trackers, logs a number, a distribution and a video, and closes them."""
    accelerator = Accelerator(log_with=tracker_names(report_to), project_dir=folder)
    start_trackers(accelerator, report_to, "nft", {"rank": "4"}, "a run", folder, resume)
    accelerator.log({"train/kl": 0.25}, step=7)
    log_distributions(accelerator, {"reward/match": SCORES, "reward/nothing": SCORES[3:]}, step=7)
    log_video(accelerator, "eval/videos", video_images(FRAMES), 16, step=7)
    accelerator.end_training()


def events_of(folder):
    return EventAccumulator(str(folder / "nft"), size_guidance={"histograms": 0, "images": 0}).Reload()


def test_tensorboard(tmp_path):
    run_trackers("tensorboard", tmp_path)
    events = events_of(tmp_path)
    (image,) = events.Images("eval/videos")
    assert (image.step, image.encoded_image_string) == (7, gif_bytes(video_images(FRAMES), 16))
    assert events.Tags()["histograms"] == ["reward/match"]
    (histogram,) = events.Histograms("reward/match")
    value = histogram.histogram_value
    assert (histogram.step, value.num, value.sum, value.min, value.max) == (7, 3, 2, 0, 1)


def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_trackers("wandb", tmp_path)
    wandb.teardown()  # as at the end of a process: its service has written everything
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    name = (tmp_path / "wandb_id").read_text()
    assert folder.name.endswith(name)
    (gif,) = folder.rglob("*.gif")
    assert gif.read_bytes() == gif_bytes(video_images(FRAMES), 16)
    (record,) = wandb_history(folder / f"run-{name}.wandb")
    counts = record["reward/match/values"]
    assert (record["_step"], record["train/kl"]) == (7, 0.25)
    assert (counts[0], counts[-1], sum(counts)) == (1, 2, 3) and "reward/nothing/values" not in record
    # A run that is resumed goes on under its name.
    run_trackers("wandb", tmp_path, resume=True)
    assert (tmp_path / "wandb_id").read_text() == name
    run_trackers("wandb", tmp_path)
    assert (tmp_path / "wandb_id").read_text() != name


def wandb_history(path):
    """What was logged to a run, read from its transaction log: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, part, rows = path.read_bytes(), 7, b"", []
    while position < len(data):
        left = 32768 - position % 32768
        if left < 7:  # a record's header lies in one block
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        part += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            items = Record.FromString(part).history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
            part = b""
    return list(filter(None, rows))


def test_a_tracker_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(trackers_module, "get_available_trackers", lambda: ["tensorboard"])
    assert tracker_names("tensorboard") == ["tensorboard"] and tracker_names("none") == []
    for report_to in ("wandb", "all"):
        with pytest.raises(UserError, match=f"report_to={report_to} needs .* wandb: pip install wandb"):
            tracker_names(report_to)


def test_a_tracker_that_cannot_start(tmp_path, monkeypatch):
    accelerator = Accelerator(log_with="tensorboard", project_dir=tmp_path)
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", lambda *_: 1 / 0)
    with pytest.raises(UserError, match="report_to=tensorboard: division by zero"):
        start_trackers(accelerator, "tensorboard", "nft", {}, "a run", tmp_path, resume=False)


class NoNetwork(GeneralTracker):
    """A tracker of which nothing arrives."""

    requires_logging_directory = False
    tracker = None

    def __init__(self, name, error):
        self.name, self.error = name, error
        super().__init__()

    def log(self, values, step):
        raise self.error


@pytest.mark.parametrize(
    ("name", "error", "told"),
    [
        ("wandb", ConnectionError("no route to host"), "report_to=wandb: no route to host"),
        ("wandb", type("CommError", (Exception,), {"__module__": "wandb.errors.errors"})("a\nb"), "wandb: a b"),
        ("tensorboard", OSError(28, "No space left on device"), "cannot write .*logs: .*No space left"),
        ("tensorboard", ValueError("a bug"), None),
    ],
)
def test_errors_of_the_network_and_of_the_disk(tmp_path, name, error, told):
    accelerator = Accelerator(project_dir=tmp_path / "logs")
    accelerator.trackers = [NoNetwork(name, error)]
    with pytest.raises(UserError if told else type(error), match=told) as raised:
        log_numbers(accelerator, {"train/kl": 0.5}, step=1)
    assert ("write" in str(raised.value)) == (name == "tensorboard" and bool(told))
