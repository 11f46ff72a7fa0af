import json
import math
import struct

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from astrolabe_diffusers.cli.train import parse_args
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
from astrolabe_diffusers.training import NFTTrainer
from tests.training.helpers import BRIGHTNESS, tiny_arguments


CONTRAST = "tests.training.rewards:contrast"
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


def test_what_a_run_logs(model_folder, tmp_path):
    """Every loss part, KL, groups of no spread, statistics and distributions of rewards, speeds and videos."""
    trainer = NFTTrainer(config=parse_args(tiny_arguments(model_folder, tmp_path, max_train_steps=1)))
    trainer.train()
    events = events_of(tmp_path / "logs")
    scalars = set(events.Tags()["scalars"])
    train = ("loss", "policy_loss", "kl", "zero_spread_groups", "grad_norm", "peak_memory_gb")
    parts = ("sampling", "scoring", "training")
    speed = [name for part in parts for name in (f"seconds_{part}", f"samples_per_second_{part}")]
    expected = {f"train/{name}" for name in train} | {f"speed/{name}" for name in speed}
    rewards = ("reward", BRIGHTNESS, f"{BRIGHTNESS}/red")
    expected |= {f"reward/{name}/{key}" for name in rewards for key in ("mean", "std", "min", "max", "group_std")}
    expected |= {f"eval/{name}/{key}" for name in ("reward", CONTRAST) for key in ("mean", "std", "min", "max")}
    assert expected <= scalars, expected - scalars
    assert not any(name.startswith("train/reward") or BRIGHTNESS in name and "train/" in name for name in scalars)
    assert {f"reward/{name}" for name in rewards} <= set(events.Tags()["histograms"])
    assert events.Histograms("reward/reward")[0].histogram_value.num == 8
    assert [image.step for image in events.Images("eval/videos")] == [0, 1]

    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    statistics = record["statistics"]["reward"]
    assert statistics["mean"] == pytest.approx(record["reward"])
    assert statistics["group_std"] == pytest.approx(record["group_std"], rel=1e-4)
    seconds = record["seconds_sampling"]
    assert record["samples_per_second_sampling"] == pytest.approx(8 / seconds)
    logged = events.Scalars(f"reward/{BRIGHTNESS}/max")[0].value
    assert logged == pytest.approx(record["statistics"][BRIGHTNESS]["max"])
