"""A server that answers, until a signal comes or in the background."""

import gc
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from ..errors import Interrupted


def leave_loaded_alone():
    """To be called once a process has loaded what it serves. Python's garbage collector goes through all objects now
    and then, which are some 400,000 with a small model, for 0.2 to 0.3 s in which nothing else runs: from now on it
    passes over those that are there."""
    gc.collect()
    gc.freeze()


def run(server: uvicorn.Server, listener: socket.socket):
    """Answers until SIGINT or SIGTERM comes: then, whom it can, and an [`Interrupted`]."""

    def interrupt(number, _):
        raise Interrupted(number)

    # uvicorn raises the signal again when it has ended, for these. The system's own handler of SIGTERM would end the
    # process at once, and leave its files.
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def in_thread(server: uvicorn.Server, listener: socket.socket) -> Iterator[str]:
    """Inside, it answers in a thread of its own, at the address `HOST:PORT` that this yields."""
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield "{}:{}".format(*listener.getsockname())
    finally:
        server.should_exit = True
        thread.join()
