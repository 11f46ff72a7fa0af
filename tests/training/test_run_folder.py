"""Which folders a run may write to. What is refused is refused before anything is loaded, and stays as it is."""

import json
import sys
from pathlib import Path

import pytest

from astrolabe_diffusers.cli.train import parse_args
from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.evaluation.loras import open_evaluation_folder
from astrolabe_diffusers.training.run_folder import open_training_folder
from tests.training.helpers import config, full_disk, tiny_arguments


sys.path.append(str(Path(__file__).parents[2] / "examples"))
from train_nft import main  # noqa: E402


def fill(folder, *names, has_begun=True):
    """A folder in which a run of this version, or of one before it, has written these files."""
    if has_begun:
        with open_training_folder(config(output_dir=folder)) as begun:
            begun.begin()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def refusal(folder, **values):
    """What is said of a folder, or `None` if a run may begin there."""
    before = contents(folder)
    try:
        with open_training_folder(config(output_dir=folder, **values)):
            pass
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    finally:
        assert contents(folder) == before
    return None


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


RUN = ("config.yaml", "metrics.jsonl", "eval.jsonl", "checkpoints/checkpoint-1/trainer_state.json")
FINISHED = (*RUN, "results.json", "README.md", "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("has_begun", [True, False])
def test_a_run_is_gone_on_with_or_left_alone(tmp_path, has_begun):
    for files, state in ((RUN, "a run that has not ended"), (FINISHED, "a finished run")):
        folder = fill(tmp_path / state, *files, has_begun=has_begun)
        for values in ({}, {"resume_from_checkpoint": str(fill(tmp_path / "other" / "checkpoint-9"))}):
            message = refusal(folder, **values)
            assert f"{folder} holds {state}" in message
            for way_out in (
                "--resume_from_checkpoint latest",
                "another --output_dir",
                "--overwrite_output_dir true",
            ):
                assert way_out in message
        own = folder / "checkpoints" / "checkpoint-1"
        for name in ("latest", "checkpoint-1", str(own), "checkpoint-77"):
            assert refusal(folder, resume_from_checkpoint=name) is None
        assert refusal(folder, overwrite_output_dir=True) is None


def test_a_run_that_was_killed_before_its_first_log_is_one(tmp_path):
    folder = fill(tmp_path, "config.yaml")
    assert "holds a run that has not ended" in refusal(folder)
    assert refusal(folder, resume_from_checkpoint="latest") is None


def test_files_of_others_are_named(tmp_path):
    folder = fill(tmp_path, "README.md", "config.yaml", "src/code.py", "slurm-1.out", has_begun=False)
    for resume in (None, "latest"):
        message = refusal(folder, resume_from_checkpoint=resume)
        assert "config.yaml, README.md" in message and "slurm" not in message and "code.py" not in message
        assert "--overwrite_output_dir true" in message
    assert refusal(folder, overwrite_output_dir=True) is None


def test_files_that_no_run_writes_are_no_reason(tmp_path):
    folder = fill(tmp_path, "slurm-1.out", "notes.txt", "checkpoints/model.pt", "logs/mine.txt", has_begun=False)
    for resume in (None, "latest"):
        assert refusal(folder, resume_from_checkpoint=resume) is None


def test_an_empty_or_new_folder_is_free(tmp_path):
    for resume in (None, "latest"):
        with open_training_folder(config(output_dir=tmp_path / f"{resume}", resume_from_checkpoint=resume)):
            pass
        assert refusal(tmp_path / f"{resume}", resume_from_checkpoint=resume) is None


def test_overwriting_removes_what_looks_finished_and_keeps_checkpoints(tmp_path):
    best = "best/pytorch_lora_weights.safetensors"
    fill(tmp_path, *FINISHED, "eval_videos/step-0/000.mp4", best, "mine.txt")
    with open_training_folder(config(output_dir=tmp_path, overwrite_output_dir=True)) as folder:
        folder.remove_files()
    left = {str(path.relative_to(tmp_path)) for path in contents(tmp_path)}
    assert left == {".run", "mine.txt", "checkpoints/checkpoint-1/trainer_state.json"}


def test_the_folder_of_a_full_disk_is_one_line_and_closes(tmp_path):
    with full_disk(), pytest.raises(UserError, match=r"cannot write .*\.run: "):
        with open_training_folder(config(output_dir=tmp_path)) as folder:
            folder.begin()
    assert not list(tmp_path.iterdir())


def test_leave_to_overwrite_is_for_one_start(tmp_path):
    config(overwrite_output_dir=True, rank=3).save(tmp_path / "config.yaml")
    saved = parse_args(["--config", str(tmp_path / "config.yaml")])
    assert not saved.overwrite_output_dir and saved.rank == 3


def test_the_second_of_two_runs_ends_at_once(model_folder, tmp_path, capsys):
    """Whatever its settings, before the model is loaded, and the first one's checkpoint is left alone."""
    values = {"model": "/no/model", "prompts": model_folder / "prompts"}
    with open_training_folder(config(output_dir=tmp_path)) as first:
        first.begin()
        partial = tmp_path / "checkpoints" / "checkpoint-1.partial"
        partial.mkdir(parents=True)
        for more in ({}, {"resume_from_checkpoint": "latest"}, {"overwrite_output_dir": "true"}):
            assert main(tiny_arguments(model_folder, tmp_path, **values | more)) == 2
            assert capsys.readouterr().err == (
                f"error: another run is writing to {tmp_path}: wait for it, or name another folder.\n"
            )
        assert partial.is_dir()
    assert main(tiny_arguments(model_folder, tmp_path / "new", **values)) == 2
    assert "cannot load /no/model" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["/proc/nope", "loop", "nul\0byte", "file/below"])
def test_folders_that_cannot_be(tmp_path, monkeypatch, capsys, model_folder, where):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    assert main(tiny_arguments(model_folder, where)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: output_dir ") and error.count("\n") == 1


@pytest.mark.parametrize("where", ["../../escape", "/tmp/escape", "logs/../../escape"])
def test_logs_stay_in_the_folder(where):
    with pytest.raises(UserError, match="logging_dir .* must be a folder inside output_dir"):
        config(logging_dir=where)


def test_an_evaluation_writes_over_an_evaluation_alone(tmp_path):
    def opens(folder, overwrite=False, columns=("base", "lora")):
        before = contents(folder)
        try:
            with open_evaluation_folder(str(folder), list(columns), overwrite) as evaluation:
                evaluation.begin()
        except UserError as error:
            assert contents(folder) == before and "\n" not in str(error)
            return str(error)
        return None

    ours = {"settings": {}, "versions": {}, "videos": [], "columns": {}}
    for results, is_ours in ((ours, True), ({"accuracy": 1}, False), ([1], False), ("no JSON", False)):
        folder = tmp_path / f"{results}"[:9]
        fill(folder, "table.md", "notes.txt", "videos/other/000.mp4", has_begun=False)
        (folder / "results.json").write_text(results if isinstance(results, str) else json.dumps(results))
        message = opens(folder)
        if is_ours:
            assert message is None
        else:
            assert "results.json, table.md" in message and "--overwrite true" in message and "notes" not in message
            assert opens(folder, overwrite=True) is None
        assert opens(folder) is None  # the second time it is an evaluation's
    fill(tmp_path / "videos only", "videos/lora/000.mp4", has_begun=False)
    assert "videos/lora/000.mp4" in opens(tmp_path / "videos only")
    assert opens(tmp_path / "videos only", columns=["base"]) is None
    run = fill(tmp_path / "run", *FINISHED)
    assert "has results.json, which evaluation did not make" in opens(run)
