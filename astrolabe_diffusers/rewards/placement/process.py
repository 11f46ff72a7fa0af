"""Rewards in a process of their own, which is started anew once if it dies."""

import functools
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError

from ...errors import summarize_exception
from .. import built_in
from ..frames import FrameRequest
from ..reward import Closing, RewardError, RewardOutput, RewardPlacementError
from .local import LocalRewards
from .wire import ScoringJob, outputs_from_json, outputs_to_json, pack_job, unpack_job


logger = logging.getLogger(__name__)

# To load what a reward is made of, from a slow disk if need be.
START_SECONDS = 1800.0
# Until a process that is closed is killed.
END_SECONDS = 5.0
# A server that has loaded this package once gives processes in no time. On macOS libraries do not survive its fork.
START_METHOD = "forkserver" if sys.platform == "linux" else "spawn"


class ProcessRewards(Closing):
    """
    Rewards in a process of their own, with a CUDA context and a Python interpreter of their own: they neither wait for
    the trainer nor does it wait for them.

    A process that dies is started anew and asked again, once for each batch; a second death, and an answer that takes
    too long, raise `RewardPlacementError`.

    Args:
        rewards: as in `LocalRewards`, but no objects.
        timeout: seconds that scoring a batch may take.
        arguments: others of `LocalRewards`. Without a `device` a reward that takes the GPU takes that of this process.
    """

    def __init__(self, rewards: Mapping[str, str], timeout: float = 300.0, **arguments: Any):
        self.names, self.timeout = list(rewards), timeout
        gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._loading = (gpu, {"rewards": rewards, **arguments})
        self._requests = functools.cache(lambda *shape: self._ask(_requests, *shape))
        self._lock, self._closed = threading.Lock(), False
        self._start()

    def __str__(self):
        return f"the process of the rewards {', '.join(self.names)}"

    def score(self, videos, prompts, metadata, context=None) -> dict[str, RewardOutput]:
        """As `LocalRewards.score`."""
        requests = self._requests(videos.shape[1], *videos.shape[-2:])
        job = ScoringJob.make(videos, requests, prompts, metadata, context, self.num_context_frames)
        return outputs_from_json(self._ask(_score, pack_job(job)), self.names, len(prompts))

    def _start(self):
        # CUDA does not survive a fork, and in a server that somebody else has started it may be initialised: libraries
        # ask for it when they are imported.
        gpu, _ = self._loading
        context = multiprocessing.get_context(START_METHOD if gpu is None else "spawn")
        if context.get_start_method() == "forkserver":
            context.set_forkserver_preload([__name__, built_in.__name__])
        self._executor = ProcessPoolExecutor(1, context, _begin, (dict(os.environ),))
        try:
            loaded = self._call(START_SECONDS, _load, *self._loading)
            self.using_prompts: list[str] = loaded[0]
            self.num_context_frames: int = loaded[1]
        except BrokenProcessPool:
            raise RewardPlacementError(f"{self} ended while it was loading{self._exit_code()}.") from None
        except Exception:
            self._end()
            raise

    def _ask(self, function: Callable, *arguments: Any) -> Any:
        try:
            return self._call(self.timeout, function, *arguments)
        except BrokenProcessPool:
            logger.warning("%s ended%s; it is started anew.", self, self._exit_code())
        self._start()
        try:
            return self._call(self.timeout, function, *arguments)
        except BrokenProcessPool:
            raise RewardPlacementError(f"{self} ended twice over the same videos{self._exit_code()}.") from None

    def _call(self, timeout: float, function: Callable, *arguments: Any) -> Any:
        """What the process, which the first call starts, makes of the arguments."""
        ended = RewardPlacementError(f"{self} was ended.")
        with self._lock:
            if self._closed:
                raise ended
            future = self._executor.submit(function, *arguments)
            # Before Python 3.14 an executor has no other way to kill.
            (self._process,) = self._executor._processes.values()
        if not wait([future], timeout).done:
            self._process.kill()
            wait([future])
            raise RewardPlacementError(f"{self} did not answer within {timeout:g} s and was ended.")
        try:
            return future.result()
        except BrokenProcessPool:
            if self._closed:  # by another thread, which does not wait for this answer
                raise ended from None
            raise

    def _exit_code(self) -> str:
        self._end()
        code = self._process.exitcode
        return f" by {signal.Signals(-code).name}" if code < 0 else f" with exit code {code}"

    def close(self):
        """Ends the process, also in the midst of an answer that another thread waits for."""
        self._closed = True
        self._end()

    def _end(self):
        killer = threading.Timer(END_SECONDS, self._process.kill)
        with self._lock:  # an executor cannot be shut down by two threads at a time
            killer.start()
            self._executor.shutdown()
            killer.cancel()


@contextmanager
def _told(*kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds go to the trainer as they are, and others, whose class it may lack, by their summary."""
    try:
        yield
    except (Exception, SystemExit) as error:
        kind = next((kind for kind in kinds if isinstance(error, kind)), None)
        raise kind(str(error)) if kind else RuntimeError(summarize_exception(error)) from None


# What the process has loaded.
_rewards: LocalRewards


def _begin(environment: dict[str, str]):
    # Ctrl-C reaches this process too; the trainer, which handles it, ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A server's is that of the time at which it was started.
    os.environ.update(environment)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


# The user's mistakes, which the trainer tells in one line.
@_told(ValueError, ImportError, OSError, SafetensorError)
def _load(gpu: int | None, arguments: dict[str, Any]) -> tuple[list[str], int]:
    global _rewards
    if gpu is not None:
        torch.cuda.set_device(gpu)
    _rewards = LocalRewards(**arguments)
    return _rewards.using_prompts, _rewards.num_context_frames


@_told(ValueError)
def _requests(*shape: int) -> dict[str, FrameRequest | None]:
    return _rewards.requests(*shape)


@_told(RewardError, ValueError)
def _score(data: bytes) -> dict[str, Any]:
    return outputs_to_json(_rewards.score_job(unpack_job(data)))
