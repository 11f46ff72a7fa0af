"""Rewards in a process of their own, which is started anew once if it dies."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import signal
import threading
import traceback
from collections.abc import Iterable
from multiprocessing.connection import Connection
from typing import Any

import torch
from safetensors import SafetensorError

from ..closing import Closing
from ..frames import FrameRequest
from ..reward import RewardError, RewardOutput, RewardPlaceError
from .local import LocalRewards
from .wire import ScoringJob, outputs_from_json, outputs_to_json, pack_job, unpack_job


logger = logging.getLogger(__name__)

# To load what a reward is made of, from a slow disk if need be.
START_SECONDS = 1800.0


class _Died(Exception):
    """The process is gone."""


class ProcessRewards(Closing):
    """
    Rewards in a process of their own, with a CUDA context and a Python interpreter of their own: they neither wait for
    the trainer nor does it wait for them.

    A process that dies is started anew and asked again, once for each batch; a second death, and an answer that takes
    more than `timeout` seconds, raise `RewardPlaceError`.

    Args:
        names, options: as in `LocalRewards`.
        device: of the weights; each reward's own if not given, on the GPU of this process.
        timeout: seconds that scoring a batch may take.
        defaults: as in `get_reward`.
    """

    def __init__(
        self,
        names: Iterable[str],
        options: dict[str, dict[str, Any]] | None = None,
        device: str | None = None,
        timeout: float = 300.0,
        defaults: dict[str, Any] | None = None,
    ):
        self.names, self.timeout = list(names), timeout
        self._rewards = {"rewards": self.names, "options": options, "device": device, "defaults": defaults}
        self._requests: dict[tuple[int, int, int], dict[str, FrameRequest | None]] = {}
        self._numbers = itertools.count()
        self._closed = False
        self._start()

    def _start(self):
        # CUDA does not survive a fork.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._process = context.Process(target=_work, args=(theirs, self._rewards, gpu), name="rewards", daemon=True)
        self._process.start()
        theirs.close()
        try:
            self.using_prompts: list[str] = self._exchange("start", None, START_SECONDS)
        except _Died:
            raise RewardPlaceError(f"{self} ended while it was loading{self._exit_code()}.") from None

    def __str__(self):
        return f"the process of the rewards {', '.join(self.names)}"

    def score(
        self, videos: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None
    ) -> dict[str, RewardOutput]:
        """As `LocalRewards.score`."""
        shape = (videos.shape[1], *videos.shape[-2:])
        if shape not in self._requests:
            self._requests[shape] = self._ask("requests", shape)
        data = pack_job(ScoringJob.make(videos, self._requests[shape], prompts, metadata))
        return outputs_from_json(self._ask("score", data), self.names, len(prompts))

    def _ask(self, question: str, content: Any) -> Any:
        try:
            return self._exchange(question, content, self.timeout)
        except _Died:
            if self._closed:  # by another thread, which does not wait for this answer
                raise RewardPlaceError(f"{self} was ended.") from None
            logger.warning("%s ended%s; it is started anew.", self, self._exit_code())
        self._end()
        self._start()
        try:
            return self._exchange(question, content, self.timeout)
        except _Died:
            raise RewardPlaceError(f"{self} ended twice over the same videos{self._exit_code()}.") from None

    def _exchange(self, question: str, content: Any, timeout: float) -> Any:
        number, expired = next(self._numbers), threading.Event()

        def expire():
            expired.set()
            self._process.kill()  # which also ends the waiting below, to be read and to be answered

        timer = threading.Timer(timeout, expire)
        timer.daemon = True  # Python waits for other threads before it exits
        timer.start()
        try:
            if question != "start":
                self._connection.send((number, question))
                (self._connection.send_bytes if question == "score" else self._connection.send)(content)
            answered, kind, answer = self._connection.recv()
        except (EOFError, OSError):
            if expired.is_set():
                raise RewardPlaceError(f"{self} did not answer within {timeout:g} s and was ended.") from None
            raise _Died from None
        finally:
            timer.cancel()
        if answered != number and question != "start":
            self._process.kill()
            raise RewardPlaceError(f"{self} answered another question than it was asked, and was ended.")
        if kind is not None:
            raise kind(answer)
        return answer

    def _exit_code(self) -> str:
        self._process.join(5)
        code = self._process.exitcode
        return f" by {signal.Signals(-code).name}" if code and code < 0 else f" with exit code {code}"

    def close(self):
        """Ends the process, also in the midst of an answer that another thread waits for."""
        self._closed = True
        self._end()

    def _end(self):
        self._connection.close()
        self._process.join(5)
        self._process.kill()
        self._process.join()


def _work(connection: Connection, arguments: dict[str, Any], gpu: int | None):
    # Ctrl-C reaches this process too; it ends when the trainer, which handles it, closes the connection.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if gpu is not None:
        torch.cuda.set_device(gpu)
    try:
        rewards = LocalRewards(**arguments)
    except Exception as error:
        # The first four are the user's mistakes, which the trainer tells in one line.
        kinds = (ValueError, ImportError, OSError, SafetensorError, RuntimeError)
        kind = next((kind for kind in kinds if isinstance(error, kind)), RuntimeError)
        connection.send((None, kind, str(error) if kind is not RuntimeError else describe_failure(error)))
        return
    connection.send((None, None, rewards.using_prompts))
    while True:
        try:
            number, question = connection.recv()
            if question == "requests":
                answer = rewards.requests(*connection.recv())
            else:
                job = unpack_job(connection.recv_bytes())
                answer = outputs_to_json(rewards.score_job(job))
        except EOFError:
            return
        except RewardError as error:
            connection.send((number, RewardError, str(error)))
        except Exception as error:
            connection.send((number, RuntimeError, describe_failure(error)))
        else:
            connection.send((number, None, answer))


def describe_failure(error: Exception) -> str:
    """Type, message and place of an exception in one line that is not too long."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    message = " ".join(str(error).split())
    if len(message) > 1000:
        message = f"{message[:1000]}..."
    return f"{type(error).__name__}: {message} ({frame.filename}:{frame.lineno})"
