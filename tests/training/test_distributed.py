"""Two processes over gloo against one process in here."""

import json

import pytest
import torch
from accelerate import Accelerator

from tests.processes import Torchrun
from tests.training.distributed_worker import rollout_and_gradients
from tests.training.helpers import tiny_arguments


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    code, output = Torchrun("tests/training/distributed_worker.py", folder).finish()
    assert code == 0, output
    results = [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
    assert [result["world_size"] for result in results] == [2, 2]
    return results


@pytest.fixture(scope="module")
def single():
    accelerator = Accelerator(mixed_precision="no")
    assert accelerator.num_processes == 1
    return rollout_and_gradients(accelerator, batch_size=4)


def test_samples_and_scores_do_not_depend_on_the_number_of_processes(ranks, single):
    _, scores, _ = single
    for result in ranks:
        assert result["scores"].keys() == scores.keys()
        for name, values in scores.items():
            torch.testing.assert_close(result["scores"][name], values, rtol=0, atol=1e-5)


def test_averaged_gradients_are_those_of_one_process(ranks, single):
    _, _, expected = single
    assert all(map(torch.equal, ranks[0]["gradients"], ranks[1]["gradients"]))
    largest = max(g.abs().max() for g in expected)
    torch.testing.assert_close(ranks[0]["gradients"], expected, rtol=1e-3, atol=1e-4 * largest.item())


def test_wrapping_while_the_old_policy_is_active_would_not_synchronise(ranks):
    """The reason for the order in the trainer; should peft or DDP change, this says that it may go."""
    assert not all(map(torch.equal, ranks[0]["wrapped_wrongly"], ranks[1]["wrapped_wrongly"]))


def test_error_of_one_process_reaches_the_other(ranks):
    assert "ZeroDivisionError" in ranks[0]["error"] and ranks[0]["error"] == ranks[1]["error"]


def test_checkpoint_of_two_processes_is_complete(ranks):
    names = ["pytorch_lora_weights.safetensors", "pytorch_lora_weights_old.safetensors", "trainer_state.json"]
    assert set(ranks[0]["checkpoint"]) == {*names, "optimizer.safetensors", "config.yaml", "files.json"}


def test_ddp_goes_before_the_process_group(model_folder, tmp_path):
    """The other way round one run in four of a small model hung at its end (torch 2.13, gloo)."""
    arguments = tiny_arguments(model_folder, tmp_path / "run", max_train_steps=1, num_frames=9)
    code, output = Torchrun("tests/training/end_worker.py", tmp_path, *arguments).finish()
    assert code == 0, output
    for rank in range(2):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == [True, [0]]
