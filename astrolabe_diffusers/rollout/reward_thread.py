"""The thread in which rewards are computed."""

import atexit
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress

from ..errors import UserError
from ..rewards.reward import Closing


PATIENCE = 10


class RewardThread(Closing):
    """Runs calls one after the other in a background thread.

    Python waits for the threads of a `ThreadPoolExecutor` before it exits, so that a reward that hangs would keep a
    failed run from ending. This one is given `PATIENCE` seconds to come to the end of its call: to end a thread in the
    midst of torch's code may crash the process. A call counts as hung after `timeout` seconds; its future then holds a
    [`UserError`]. The `initializer` is called first, in the thread.
    """

    def __init__(self, timeout: float, initializer: Callable[[], object] | None = None):
        self.timeout = timeout
        self._calls = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._work, args=(initializer,), name="rewards", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def submit(self, function: Callable, *arguments) -> Future:
        """The result of a call as a future; a [`UserError`] once the thread is closed, for nobody would run it."""
        if self._closed:
            raise UserError("the rewards are closed: what scored videos with them has ended.")
        future = Future()
        self._calls.put((future, function, arguments))
        return future

    def close(self):
        """Ends the thread after the calls so far; waits for them no longer than `PATIENCE` seconds."""
        atexit.unregister(self.close)
        self._closed = True
        self._calls.put(None)
        self._thread.join(PATIENCE)

    def _work(self, initializer: Callable[[], object] | None):
        if initializer is not None:
            initializer()
        while (call := self._calls.get()) is not None:
            self._run(*call)
            del call  # its videos, while the next one is waited for

    def _run(self, future: Future, function: Callable, arguments: tuple):
        watchdog = threading.Timer(self.timeout, self._give_up, (future,))
        watchdog.daemon = True
        watchdog.start()
        # A result that comes too late finds its future taken.
        with suppress(InvalidStateError):
            try:
                future.set_result(function(*arguments))
            except Exception as error:
                future.set_exception(error)
            except BaseException as error:  # sys.exit() in a reward must not end the run with its code
                future.set_exception(UserError(f"a reward ended with {error!r}."))
        watchdog.cancel()

    def _give_up(self, future: Future):
        problem = f"a reward has not answered for {self.timeout:g} s; raise reward_timeout if it needs longer."
        with suppress(InvalidStateError):
            future.set_exception(UserError(problem))
