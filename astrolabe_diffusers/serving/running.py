"""A server that answers, until a signal comes or in the background."""

import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from ..errors import Interrupted


def run(server: uvicorn.Server, listener: socket.socket):
    """Answers until a signal comes: then, whom it can, and an [`Interrupted`]."""
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        raise Interrupted(signal.SIGINT) from None


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
