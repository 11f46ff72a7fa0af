"""Scripts as processes of their own that do not import torch anew, which takes each of them seconds.

They are forked from a server that has the package loaded and has computed nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil


ROOT = Path(__file__).parents[1]
CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
PRELOADED = (
    "astrolabe_diffusers.evaluation.held_out",
    "astrolabe_diffusers.generation.run",
    "astrolabe_diffusers.training.nft.trainer",
    "matplotlib.figure",
    "torch.distributed.run",
    "tests.fast_norm",
)

# A process has one server, which the processes of rewards are forked from too. What asks for CUDA when it is imported
# has not used it, and may be forked, where torch asks NVML.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(list(PRELOADED))


class Script:
    """A script that runs in the repository's root with Ctrl-C as in a terminal; what it writes is one stream.

    Args:
        arguments: The script's path, relative to the repository's root, and its command line.
        environment: Variables beyond those of this process.
    """

    def __init__(self, *arguments: str | Path, **environment: str):
        self._start(_run_script, arguments, environment)

    def _start(self, function: Callable, arguments: tuple, environment: dict[str, str]):
        handle, name = tempfile.mkstemp(prefix="output-")
        os.close(handle)
        self._output = Path(name)
        self._process = _server.Process(
            target=_child, args=(function, list(map(str, arguments)), {**os.environ, **CPU, **environment}, name)
        )
        self._process.start()
        atexit.register(self.kill_all)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int):
        os.kill(self.pid, number)

    def signal_group(self, number: int):
        """To the process and all that it has started, as a terminal does."""
        os.killpg(self.pid, number)

    def kill_all(self):
        """kill -9 to the process and all that it has started."""
        if self.returncode is None:
            process = psutil.Process(self.pid)
            for victim in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.kill()
            self._process.join()

    def output(self) -> str:
        """What it has written up to now."""
        return self._output.read_text()

    def wait_for(self, met: Callable[[], bool] | str, timeout: float = 180):
        """Waits until its output has a text, or a condition is met, while it runs."""
        if isinstance(met, str):
            text, met = met, lambda: text in self.output()
        deadline = time.monotonic() + timeout
        while not met():
            assert self.returncode is None and time.monotonic() < deadline, self.output()
            time.sleep(0.01)

    def finish(self, timeout: float = 180) -> tuple[int, str]:
        """Waits for its end; exit code and output."""
        self._process.join(timeout)
        if self.returncode is None:
            self.kill_all()
            raise TimeoutError(self.output())
        return self.returncode, self.output()


class Torchrun(Script):
    """torchrun with two processes on the CPU.

    Args:
        rendezvous: a new file through which `machines` launchers find each other; without one there is one.
    """

    def __init__(self, *arguments: str | Path, rendezvous: Path | None = None, machines: int = 1, **environment: str):
        self._meeting = ["--standalone"]
        if rendezvous:
            options = {"nnodes": machines, "rdzv_backend": "c10d", "rdzv_conf": "store_type=file", "rdzv_id": 1}
            self._meeting = [f"--{name}={value}" for name, value in options.items()]
            self._meeting.append(f"--rdzv_endpoint={rendezvous}")
        super().__init__(*arguments, **environment)

    def _start(self, function: Callable, arguments: tuple, environment: dict[str, str]):
        # A path, and not a program: the launcher forks its processes as the server forked it.
        options = ["--nproc_per_node=2", "--start_method=fork", "--run_path"]
        super()._start(_run_torchrun, (*self._meeting, *options, *arguments), environment)


def _run_script(path: str, *arguments: str):
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


def _run_torchrun(*arguments: str):
    from torch.distributed.run import main

    main(list(arguments))


def _child(function: Callable, arguments: list[str], environment: dict[str, str], output: str):
    os.setsid()
    # As tests/conftest.py.
    gc.freeze()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    sys.path += environment["PYTHONPATH"].split(os.pathsep)
    # The server has looked for it in its own environment.
    tempfile.tempdir = None
    # A shell that runs the tests in the background has Ctrl-C ignored, and every process inherits that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stream = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.stdout.reconfigure(line_buffering=True)
    function(*arguments)
