"""Connections of a server that idle and slow clients cannot hold: the bounds that uvicorn does not have."""

import logging
import math
from dataclasses import dataclass
from functools import partial

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol


try:
    import resource
except ImportError:  # on Windows, where open files have no such limit
    resource = None


# What a client has to send in the long run, on top of `seconds`: a job of 1 GB may take an hour.
BYTES_PER_SECOND = 2**18
# Connections that wait to be accepted, which are open files too.
_BACKLOG = 64


@dataclass
class ConnectionLimits:
    """
    Attributes:
        connections: at a time; further ones are closed as soon as they are made.
        seconds: in which a request has to be complete, headers and body, and one more for each 256 kB of it; and in
            which some of an answer that waits has to be taken.
        refused: how many connections were closed for one of these reasons, or because what came was no HTTP.
    """

    connections: int = 256
    seconds: float = 10.0
    refused: int = 0


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol with these limits; its setting `http` gets a `partial` of it."""

    def __init__(self, limits: ConnectionLimits, **arguments):
        super().__init__(**arguments)
        self.limits = limits
        # A client that does not speak HTTP is counted. A line for each would be a log that clients fill.
        self.logger = logging.getLogger(f"{__name__}.clients")
        self.logger.setLevel(logging.ERROR)
        self._timer = None
        # Since when a request is awaited or comes, if so; and what came of it.
        self._began, self._received = self.loop.time(), 0
        # What waited to be taken at the last check, and when some of it was, or nothing waited.
        self._left, self._taken_at = 0, self.loop.time()

    def connection_made(self, transport):
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._refuse()
        else:
            self._check()

    def connection_lost(self, exc):
        if self._timer:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data):
        self._received += len(data)
        super().data_received(data)
        if not self._is_receiving():
            self._began = None

    def resume_writing(self):
        super().resume_writing()
        # More is written where that was taken: as much may wait as before.
        self._left = math.inf

    def handle_websocket_upgrade(self, event):
        # From here on the connection is another protocol's.
        self._timer.cancel()
        super().handle_websocket_upgrade(event)

    def send_400_response(self, msg):
        self.limits.refused += 1
        super().send_400_response(msg)

    def _is_receiving(self):
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    def _check(self):
        now = self.loop.time()
        if self._began is None and self._is_receiving():
            self._began, self._received = now, 0
        slow = self._began is not None and now > self._began + self.limits.seconds + self._received / BYTES_PER_SECOND
        left = self.transport.get_write_buffer_size()
        if left == 0 or left < self._left:
            self._taken_at = now
        self._left = left
        if slow or now > self._taken_at + self.limits.seconds:
            self._refuse()
        else:
            self._timer = self.loop.call_later(self.limits.seconds / 10, self._check)

    def _refuse(self):
        self.limits.refused += 1
        self.transport.abort()


def make_server(app, limits: ConnectionLimits, **config) -> uvicorn.Server:
    """The server of an app, with limits for its connections; `config` are uvicorn's settings of WebSockets, of which
    there are none by default. `ValueError` if it may not open as many files."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource else float("inf")
    needed = limits.connections + 4 * _BACKLOG
    if needed > files:
        raise ValueError(
            f"{limits.connections} connections need {needed} open files, and this process may have {files} "
            "(ulimit -n)."
        )
    settings = {"ws": "none"} | config
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=partial(BoundedProtocol, limits),
            lifespan="off",
            backlog=_BACKLOG,
            access_log=False,
            log_level="warning",
            h11_max_incomplete_event_size=2**14,
            # Whoever holds a connection does not keep the server from ending.
            timeout_graceful_shutdown=10,
            **settings,
        )
    )
