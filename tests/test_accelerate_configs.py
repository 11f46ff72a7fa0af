"""The files in accelerate_configs/, as accelerate reads them."""

import os
import re
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import ParallelismConfig
from accelerate.utils.launch import prepare_multi_gpu_env

from astrolabe_diffusers.distributed.sharding import mesh_sizes
from astrolabe_diffusers.training.published_runs import find_published_run


FOLDER = Path(__file__).parents[1] / "accelerate_configs"
# machines, processes, distributed, precision
EXPECTED = {
    "cpu": (1, 1, "NO", "no"),
    "1gpu": (1, 1, "NO", "bf16"),
    "8gpu": (1, 8, "MULTI_GPU", "bf16"),
    "2x8gpu": (2, 16, "MULTI_GPU", "bf16"),
    "3x8gpu": (3, 24, "MULTI_GPU", "bf16"),
    "6x8gpu": (6, 48, "MULTI_GPU", "bf16"),
    "fsdp2_8gpu": (1, 8, "FSDP", "bf16"),
    "fsdp2_2x8gpu": (2, 16, "FSDP", "bf16"),
    "fsdp2_3x8gpu": (3, 24, "FSDP", "bf16"),
    "fsdp2_6x8gpu": (6, 48, "FSDP", "bf16"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_config(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    distributed = config.distributed_type.value
    assert (config.num_machines, config.num_processes, distributed, config.mixed_precision) == EXPECTED[name]
    assert config.use_cpu == (name == "cpu")


def test_none_is_forgotten():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == EXPECTED.keys()


@pytest.mark.parametrize("name", [name for name in EXPECTED if "x8gpu" in name])
def test_machines_find_each_other_in_the_same_way(name):
    """With shards and without, and the shards are as on one machine."""
    config, plain = (
        load_config_from_file(str(FOLDER / f"{file}.yaml")) for file in (name, name.removeprefix("fsdp2_"))
    )
    for field in ("machine_rank", "main_process_ip", "main_process_port", "rdzv_backend", "same_network"):
        assert getattr(config, field) == getattr(plain, field), field
    one = load_config_from_file(str(FOLDER / ("fsdp2_8gpu.yaml" if "fsdp2" in name else "8gpu.yaml")))
    assert config.fsdp_config == one.fsdp_config


def launch(path):
    """The launcher's arguments with a config, and what it says to the processes."""
    args = launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    args, _, _ = _validate_launch_command(args)
    return args, prepare_multi_gpu_env(args)


@pytest.mark.parametrize("name", [name for name in EXPECTED if "fsdp2" in name])
def test_every_published_run_of_14b_has_shards_for_its_processes(name):
    """The launcher starts as many on each machine, which is what the mesh is made of."""
    machines, processes, *_ = EXPECTED[name]
    args, environment = launch(FOLDER / f"{name}.yaml")
    assert environment["ACCELERATE_USE_FSDP"] == "true" and environment["FSDP_VERSION"] == "2"
    assert args.nproc_per_node == str(processes // machines) == "8"
    number = "" if processes == 8 else f"_{processes}gpu"
    for variant in ("hpsv3", "multi_reward"):
        assert find_published_run(f"krea14b_video_{variant}{number}").processes == processes


def test_groups_of_a_config_with_the_line_of_the_docs(tmp_path, monkeypatch):
    text = (FOLDER.parent / "docs" / "processes_and_machines.md").read_text()
    line = re.search(r"`(parallelism_config: \{.+?\})`", text, re.S)[1]
    path = tmp_path / "config.yaml"
    path.write_text((FOLDER / "fsdp2_2x8gpu.yaml").read_text() + line)
    for name, value in launch(path)[1].items():
        if "PARALLELISM" in name:
            monkeypatch.setenv(name, value)
    assert os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] == "true"
    assert mesh_sizes([8] * 16, ParallelismConfig()) == (1, 16)
