"""What cannot be written is one line, and leaves neither half a file nor a lost one."""

import json
import stat

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.evaluation.loras import column, write_results
from astrolabe_diffusers.files.writing import replacing
from astrolabe_diffusers.generation.manifest import Manifest
from astrolabe_diffusers.reporting.comparison import Evaluation
from astrolabe_diffusers.reporting.model_card import write_card
from astrolabe_diffusers.reporting.report import RunReport, append_jsonl
from astrolabe_diffusers.reporting.trackers import start_trackers
from astrolabe_diffusers.reporting.videos import save_video, write_columns
from astrolabe_diffusers.training.adapter_files import save_adapter
from tests.reporting.test_model_card import MATCH, results
from tests.training.helpers import config, creation_mask, full_disk, policy_pipeline


FRAMES = torch.rand(9, 3, 64, 64, generator=torch.Generator().manual_seed(0))
COLUMNS = {"base": [FRAMES], "lora": [1 - FRAMES]}


def evaluate(folder):
    columns = {name: column(*[Evaluation(None, {"match": [0.1, 0.2]})] * 2) for name in ("base", "lora")}
    write_results({"columns": columns}, folder)


def start_report(folder):
    report = RunReport(config(output_dir=folder, report_to="none"), Accelerator(mixed_precision="no"), identity={})
    report.start(None)


WRITERS = {
    "adapter": lambda folder: save_adapter(policy_pipeline().transformer, folder),
    "video": lambda folder: save_video(FRAMES, folder / "videos" / "000.mp4", 16),
    "side by side": lambda folder: write_columns(COLUMNS, ["noise"], folder / "before_after", 16),
    "evaluation": evaluate,
    "settings and logs": start_report,
    "log": lambda folder: append_jsonl(folder / "metrics.jsonl", {"loss": 0.5}),
    "manifest": lambda folder: Manifest(folder).append({"file": "a.mp4"}),
    "model card": lambda folder: write_card(config(output_dir=folder, rewards={MATCH: 1.0}), results(), []),
}
TRACKERS = {
    "wandb": lambda folder: start_trackers(Accelerator(), "wandb", "nft", {}, "a run", folder / "logs", resume=False),
}


@pytest.mark.parametrize("name", WRITERS | TRACKERS)
def test_full_disk(name, tmp_path):
    with full_disk(free=5), pytest.raises(UserError, match="cannot write .*") as error:
        (WRITERS | TRACKERS)[name](tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    # A log may end in a part of a line, which is left out when it is read.
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert set(left) <= {"metrics.jsonl", "manifest.jsonl", ".manifest.lock", "wandb_id"}


@pytest.mark.parametrize("name", WRITERS | TRACKERS)
def test_folder_that_is_a_file(name, tmp_path):
    """As a folder that cannot be written to; root may write everywhere."""
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="cannot write .*out"):
        (WRITERS | TRACKERS)[name](tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_side_by_side_on_a_disk_that_the_video_still_fits_on(tmp_path):
    """The sheet does not, and what was there before stays."""
    (tmp_path / "before_after.png").write_text("an earlier one")
    write_columns(COLUMNS, ["noise"], tmp_path / "whole", 16)
    sizes = {path.suffix: path.stat().st_size for path in tmp_path.glob("whole.*")}
    smallest = min(sizes, key=sizes.get)
    assert smallest == ".mp4"
    with full_disk(sizes[smallest] + 1000), pytest.raises(UserError, match="cannot write .*before_after.png"):
        write_columns(COLUMNS, ["noise"], tmp_path / "before_after", 16)
    assert (tmp_path / "before_after.mp4").stat().st_size == sizes[".mp4"]
    assert (tmp_path / "before_after.png").read_text() == "an earlier one"
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_files_have_the_mode_of_the_umask(tmp_path, mask):
    with creation_mask(mask):
        for writer in WRITERS.values():
            writer(tmp_path)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert len(modes) >= 10 and "pytorch_lora_weights.safetensors" in modes
    assert set(modes.values()) == {0o666 & ~mask}, modes


def test_an_error_of_another_kind_leaves_the_file_before(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("1")
    with pytest.raises(ZeroDivisionError), replacing(path) as partial:
        partial.write_text("2")
        1 / 0
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"] and json.loads(path.read_text()) == 1
    with replacing(path) as partial:
        pass  # nothing was written, as by a chart without points
    assert path.read_text() == "1"


def test_video_is_the_one_given(tmp_path):
    import imageio.v3

    save_video(torch.linspace(0, 1, 9).view(9, 1, 1, 1).expand(9, 3, 32, 48), tmp_path / "a.mp4", 16)
    read = imageio.v3.imread(tmp_path / "a.mp4").astype(float)
    assert read.shape == (9, 32, 48, 3)
    np.testing.assert_allclose(read.mean((1, 2, 3)), np.linspace(0, 255, 9), atol=4)
