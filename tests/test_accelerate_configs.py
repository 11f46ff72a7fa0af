"""The files in accelerate_configs/, as accelerate reads them."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file


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
}


@pytest.mark.parametrize("name", EXPECTED)
def test_config(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    distributed = config.distributed_type.value
    assert (config.num_machines, config.num_processes, distributed, config.mixed_precision) == EXPECTED[name]
    assert config.use_cpu == (name == "cpu")


def test_none_is_forgotten():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == EXPECTED.keys()
