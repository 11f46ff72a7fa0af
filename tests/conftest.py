import functools
import gc
import importlib.metadata
import os
import sys
from multiprocessing import forkserver
from pathlib import Path


# Before anything imports the hub client: no test may need the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Processes that the tests start import the checkout as they do, and have one thread as well.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from astrolabe_diffusers.pipelines.prompt_tokens import warn_once
from tests import fast_norm
from tests.compiled import CountingBackend, compiled_blocks
from tests.tiny_pipeline import SMALL, save_tiny_pipeline


# diffusers looks peft's version up whenever it sets an adapter, in a file that is parsed each time.
importlib.metadata.version = functools.cache(importlib.metadata.version)

# The tensors are tiny: a second thread only waits, and with other work on the machine it waits for long.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--compile", choices=("inductor", "aot_eager", "eager"), help="run every transformer compiled")


def pytest_configure(config):
    # All tests but those of GPUs are about the CPU, on a machine with a GPU too.
    selected = config.option.markexpr
    if "gpu" not in selected or "not gpu" in selected:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_finish(session):
    # Every run collects garbage at its end, and would look through all that was imported here.
    gc.freeze()
    # A process has one server of processes, with what it was started with: before a test's rewards ask for one.
    if "tests.processes" in sys.modules:
        forkserver.ensure_running()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """The random tiny pipeline as a Diffusers folder, with prompts: one layer, videos of 16x32 pixels."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return save_tiny_pipeline(folder, **SMALL, num_layers=1)


@pytest.fixture(autouse=True)
def fixed_state():
    """Every test starts from the same global state, whichever tests ran before it."""
    torch.manual_seed(0)
    warn_once.cache_clear()


@pytest.fixture
def own_precision():
    """A process has one precision, of all that accelerate makes in it: here another one than before and after."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def counting_backend(request):
    name = request.config.option.compile
    return CountingBackend(name) if name else None


@pytest.fixture(autouse=True)
def compiled(request, counting_backend):
    if not counting_backend:
        yield
        return
    graphs, calls = counting_backend.graphs, counting_backend.calls
    with compiled_blocks(counting_backend):
        yield
    counts = counting_backend.graphs - graphs, counting_backend.calls - calls
    request.node.user_properties.append(("compiled", counts))


def pytest_terminal_summary(terminalreporter, config):
    """With `--compile`, how much of it was compiled."""
    if config.option.compile:
        # Of passed teardowns among others.
        reports = terminalreporter.stats.get("", [])
        counts = {r.nodeid: value for r in reports for name, value in r.user_properties if name == "compiled"}
        graphs, calls = (sum(values[i] for values in counts.values()) for i in range(2))
        without = [name for name, (_, calls) in counts.items() if not calls]
        terminalreporter.write_line(
            f"compiled with {config.option.compile}: {calls} calls of blocks in {len(counts) - len(without)} tests, "
            f"each of one of {graphs} graphs; tests without a block: {len(without)}"
        )
        for name in without:
            terminalreporter.write_line(f"  {name}")


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def diffusers_norm(monkeypatch):
    """Of a test to which diffusers' own decoder is what is right, to the last bit."""
    monkeypatch.setattr(fast_norm.WanRMS_norm, "forward", fast_norm.diffusers_forward)


def skip_charts(monkeypatch):
    """A chart takes as long as a step of a tiny run: for runs whose charts nobody looks at."""
    monkeypatch.setattr("matplotlib.figure.Figure.draw_without_rendering", lambda figure: None)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **kwargs: Path(path).touch())


@pytest.fixture
def no_charts(monkeypatch):
    skip_charts(monkeypatch)
