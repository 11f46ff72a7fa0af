import os


# Before anything imports the hub client: no test may need the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch


# The tensors are tiny: a second thread only waits, and with other work on the machine it waits for long.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    """Every test starts from the same global random state, whichever tests ran before it."""
    torch.manual_seed(0)
