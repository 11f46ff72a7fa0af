"""Two processes of a run, of which one is stopped, dies or hangs; and runs that are killed."""

import random
import signal
import time

import pytest

from astrolabe_diffusers.files.output_folder import list_checkpoints
from tests.processes import Torchrun
from tests.training.helpers import numbers_of_run, tiny_arguments


SETTINGS = dict(train_batch_size=2, batches_per_epoch=2, samples_per_prompt=4, max_train_steps=3, eval_steps=3)
SETTINGS |= dict(eval_seeds=2, checkpointing_steps=1, num_frames=9)


def start(model_folder, folder, **values):
    environment = {name: str(values.pop(name)) for name in list(values) if name.isupper()}
    arguments = tiny_arguments(model_folder, folder, **SETTINGS | values)
    return Torchrun("examples/train_nft.py", *arguments, **environment)


@pytest.fixture(scope="module")
def uninterrupted(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    code, output = start(model_folder, folder).finish()
    assert code == 0 and "2 processes on cpu" in output, output
    return numbers_of_run(folder)


@pytest.mark.slow
def test_signal_to_one_process_stops_both(model_folder, tmp_path, uninterrupted):
    values = dict(rewards="tests.training.rewards:sends_a_signal", TROUBLE_CALL=5, TROUBLE_RANK=1)
    values |= dict(TROUBLE_SIGNAL="SIGTERM", TROUBLE_MARK=tmp_path / "mark")
    code, output = start(model_folder, tmp_path / "out", **values).finish()
    assert code != 0 and "SIGTERM: --resume_from_checkpoint latest goes on from" in output
    # Nobody crashed, and torchrun had nobody to kill.
    assert "exitcode  : 143" in output and "Traceback" not in output.split("SIGTERM: --resume")[0]
    code, output = start(model_folder, tmp_path / "out", resume_from_checkpoint="latest", **values).finish()
    assert code == 0, output
    numbers = numbers_of_run(tmp_path / "out")
    assert numbers["pytorch_lora_weights.safetensors"] == uninterrupted["pytorch_lora_weights.safetensors"]
    assert numbers["state"] == uninterrupted["state"]


@pytest.mark.slow
def test_signal_to_one_process_stops_both_in_shards(model_folder, tmp_path):
    """In the second epoch, between passes for which each waits for the other."""
    values = dict(rewards="tests.training.rewards:sends_a_signal", TROUBLE_CALL=13, TROUBLE_RANK=1)
    values |= dict(TROUBLE_SIGNAL="SIGTERM", TROUBLE_MARK=tmp_path / "mark")
    values |= dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    values |= dict(train_batch_size=1, batches_per_epoch=8, checkpointing_steps=100)
    code, output = start(model_folder, tmp_path / "out", **values).finish()
    assert code != 0 and "exitcode  : 143" in output, output
    assert "Traceback" not in output.split("SIGTERM: --resume")[0]
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["checkpoint-1"]
    code, output = start(model_folder, tmp_path / "out", resume_from_checkpoint="latest", **values).finish()
    assert code == 0 and "resuming from" in output, output


def test_process_that_dies_ends_the_run(model_folder, tmp_path):
    values = dict(rewards="tests.training.rewards:dies", TROUBLE_CALL=4, TROUBLE_RANK=1)
    run = start(model_folder, tmp_path, **values)
    run.wait_for("step 1/3")
    begin = time.monotonic()
    code, _ = run.finish(timeout=60)
    assert code != 0 and time.monotonic() - begin < 60


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal_to_the_launcher(model_folder, tmp_path, uninterrupted, name):
    """What a cluster or Ctrl-C does: torchrun hands it on to its processes, and gives them half a minute."""
    run = start(model_folder, tmp_path)
    run.wait_for("step 1/3")
    run.send_signal(signal.Signals[name])
    code, output = run.finish(timeout=60)
    assert code != 0 and f"{name}: --resume_from_checkpoint latest goes on from" in output, output
    code, output = start(model_folder, tmp_path, resume_from_checkpoint="latest").finish()
    assert code == 0, output
    assert numbers_of_run(tmp_path) == uninterrupted


HANGS = dict(rewards="tests.training.rewards:hangs_once", reward_timeout=5, TROUBLE_CALL=4)
EXITS = dict(rewards="tests.training.rewards:exits")
FILLS = dict(rewards="tests.training.rewards:fills_the_disk", TROUBLE_CALL=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "values", "message"),
    [
        (0, HANGS, "a reward has not answered for 5 s"),
        (1, HANGS, "a reward has not answered for 5 s"),
        (0, EXITS, "a reward ended with SystemExit(0)"),
        (1, EXITS, "a reward ended with SystemExit(0)"),
        (0, FILLS, "cannot write"),  # the other process writes nothing
    ],
)
def test_trouble_of_one_process_ends_both_with_its_error(model_folder, tmp_path, rank, values, message):
    run = start(model_folder, tmp_path, TROUBLE_RANK=rank, **values)
    begin = time.monotonic()
    code, output = run.finish(timeout=90)
    assert code != 0
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0], output
    assert time.monotonic() - begin < 60


@pytest.mark.slow
def test_kills_change_nothing(model_folder, tmp_path):
    """kill -9 to the launcher and both processes: 20 at random moments of the training, 10 while a checkpoint is
    written or an old one removed, as the `.partial` folder shows."""
    values = dict(max_train_steps=400, eval_steps=50, checkpointing_steps=2, checkpoints_total_limit=2)
    values |= dict(learning_rate=1e-3)
    code, output = start(model_folder, tmp_path / "whole", **values).finish(timeout=600)
    assert code == 0, output
    random_moments, folder = random.Random(0), tmp_path / "killed"
    left_over = []
    for kill in range(30):
        run = start(model_folder, folder, resume_from_checkpoint="latest", **values)
        run.wait_for("output in")
        time.sleep(random_moments.uniform(0, 3 if kill < 20 else 1))
        while kill >= 20 and run.returncode is None and not list((folder / "checkpoints").glob("*.partial")):
            time.sleep(0.001)
        time.sleep(random_moments.uniform(0, 0.03))
        assert run.returncode is None, "the run is too short for so many kills"
        run.kill_all()
        left_over.append(any((folder / "checkpoints").glob("*.partial")))
    print(f"{sum(left_over)} of {len(left_over)} kills while a checkpoint was written or removed")
    assert sum(left_over) >= 3  # the others came just after the end of the writing
    code, output = start(model_folder, folder, resume_from_checkpoint="latest", **values).finish(timeout=600)
    assert code == 0 and "resuming from" in output, output
    assert numbers_of_run(folder) == numbers_of_run(tmp_path / "whole")


@pytest.mark.slow
def test_a_kill_of_a_compiled_run_changes_nothing(model_folder, tmp_path):
    values = dict(max_train_steps=4, eval_steps=4, compile=True, learning_rate=1e-3)
    code, output = start(model_folder, tmp_path / "whole", **values).finish(timeout=600)
    assert code == 0, output
    run = start(model_folder, tmp_path / "killed", **values)
    run.wait_for("step 3/4", timeout=600)
    run.kill_all()
    code, output = start(model_folder, tmp_path / "killed", resume_from_checkpoint="latest", **values).finish(600)
    assert code == 0 and "resuming from" in output, output
    assert numbers_of_run(tmp_path / "killed") == numbers_of_run(tmp_path / "whole")
