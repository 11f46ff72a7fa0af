"""Rewards for several clients, over HTTP: `create_app` is what examples/serve_reward.py runs.

| | |
|---|---|
| `GET /health` | `{"status": "ok"}`, without a token |
| `GET /rewards` | names of the rewards, which of them look at the prompt, and how large a request may be |
| `GET /requests?num_frames=&height=&width=` | what each reward needs of such videos (`requests_to_json`) |
| `POST /score` | a job (`pack_job`); the answer has the scores (`outputs_to_json`) and the header X-Request-Id |
| `GET /metrics` | counters in the text format of Prometheus |

Errors are `{"error": text}`: 400 no job or no such videos, 401 no token, 413 too large, 422 a reward refused, 500 it
failed (its own words are in the log), 503 busy.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

from ...errors import one_line, summarize_exception
from ..http_client import check_key
from ..reward import RewardError
from .batcher import Batcher
from .local import LocalRewards
from .remote import TOKEN_VARIABLE
from .wire import VERSION, ScoringJob, outputs_to_json, requests_to_json, unpack_job


try:
    import resource
except ImportError:  # on Windows, where open files have no such limit
    resource = None

try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Query, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, PlainTextResponse
    from starlette.requests import ClientDisconnect

    from .bounded_protocol import ConnectionLimits, bounded_protocol
except ImportError as error:
    raise ImportError(f"serving rewards needs FastAPI ({error}): pip install 'astrolabe_diffusers[serve]'") from error


logger = logging.getLogger(__name__)

# Of videos that are asked about: an hour and more at 24 a second, and twice 8K.
MAX_FRAMES = 100_000
MAX_SIDE = 16_384
_Frames = Annotated[int, Query(ge=1, le=MAX_FRAMES)]
_Side = Annotated[int, Query(ge=1, le=MAX_SIDE)]
# Of a request: its pieces and the whole, then this and what is unpacked, then that and the batch which it is part of.
# Only what rewards make of a batch comes on top.
_COPIES = 2
# Connections that wait to be accepted, which are open files too.
_BACKLOG = 64


def check_binding(host: str, token: str | None):
    """Raises `ValueError` if others than this machine could ask the server without a token."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback and not token:
        raise ValueError(
            f"a server on {host} can be reached from elsewhere: set {TOKEN_VARIABLE}, here and for the runs."
        )


def bind(host: str, port: int) -> socket.socket:
    """A socket at this address, at which nobody is answered yet; `OSError` or `ValueError` if there cannot be one."""
    if not 0 <= port <= 65535:
        raise ValueError(f"port must be at most 65535, not {port}.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"there is no address {host!r}: {error}") from None
    listener = socket.socket(family, kind, protocol)
    # As everywhere: so that a server can be started anew at once.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen at {host}:{port}: {error.strerror}") from None
    return listener


def create_app(
    rewards: LocalRewards,
    token: str | None = None,
    max_request_bytes: int = 2**30,
    max_batch: int = 16,
    max_waiting: int = 64,
    max_waiting_bytes: int = 2**32,
    limits: ConnectionLimits | None = None,
) -> FastAPI:
    """
    The server of these rewards.

    Args:
        rewards: what it scores.
        token: what clients have to send as `Authorization: Bearer TOKEN`, if anything.
        max_request_bytes: larger requests are refused before they are read.
        max_batch, max_waiting: as in `Batcher`.
        max_waiting_bytes: that all requests which are read, wait or are scored may take, twice their size; a client
            asks again later.
        limits: of the connections, whose count of refused ones is among the metrics.
    """
    if token:
        check_key(token, TOKEN_VARIABLE)
    batcher, held = Batcher(rewards, max_batch, max_waiting), HeldBytes(max_waiting_bytes)
    limits = limits or ConnectionLimits()
    scoring = _Scoring(batcher, held, max_request_bytes)
    # No pages of documentation: they load scripts from elsewhere.
    app = FastAPI(
        title="astrolabe_diffusers rewards",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        exception_handlers={RequestValidationError: _refuse_size, HTTPException: _refuse},
    )

    @app.middleware("http")
    async def check_token(request: Request, call_next):
        given = request.headers.get("Authorization", "").encode()
        if token and request.url.path != "/health" and not secrets.compare_digest(given, f"Bearer {token}".encode()):
            response = _error(401, "no token, or a wrong one")
        else:
            response = await call_next(request)
        batcher.counters[f"status_{response.status_code}"] += 1
        return response

    @app.get("/health")
    async def health():
        return {"status": "ok"}

    @app.get("/rewards")
    async def names():
        return {
            "rewards": list(rewards.rewards),
            "using_prompts": rewards.using_prompts,
            "max_request_bytes": max_request_bytes,
            "version": VERSION,
        }

    @app.get("/requests")
    async def requests(num_frames: _Frames, height: _Side, width: _Side):
        return JSONResponse(requests_to_json(rewards.requests(num_frames, height, width)))

    @app.get("/metrics")
    async def metrics():
        return PlainTextResponse(_metrics(batcher, held, limits))

    app.post("/score")(scoring.answer)
    return app


def _metrics(batcher: Batcher, held: HeldBytes, limits: ConnectionLimits) -> str:
    counters = batcher.counters
    statuses = sorted(key for key in counters if key.startswith("status_"))
    lines = [
        "# TYPE astrolabe_reward_responses_total counter",
        *(f'astrolabe_reward_responses_total{{status="{key[7:]}"}} {counters[key]}' for key in statuses),
    ]
    totals = {f"{key}_total": counters[key] for key in ("videos", "batches", "seconds")}
    totals["refused_connections_total"] = limits.refused
    gauges = {"waiting": batcher.num_waiting, "waiting_bytes": held.number}
    for kind, values in (("counter", totals), ("gauge", gauges)):
        for key, value in values.items():
            lines += [f"# TYPE astrolabe_reward_{key} {kind}", f"astrolabe_reward_{key} {value}"]
    return "\n".join(lines) + "\n"


@dataclass
class _Scoring:
    """What `POST /score` does."""

    batcher: Batcher
    held: HeldBytes
    max_request_bytes: int

    async def answer(self, request: Request):
        with self.held.by_request() as hold:
            try:
                # What was read is let go of as soon as it is unpacked.
                job = await asyncio.to_thread(unpack_job, await _read(request, self.max_request_bytes, hold))
            except ClientDisconnect:
                raise HTTPException(400, "the connection ended before the request did") from None
            except ValueError as error:
                raise HTTPException(400, str(error)) from None
            return await self._score(job, request.headers.get("X-Request-Id"))

    async def _score(self, job: ScoringJob, number: str | None):
        known = self.batcher.rewards.rewards
        unknown = [name for name in job.frames if name not in known]
        if unknown:
            raise HTTPException(400, f"there is no reward {unknown[0]!r}; there are {', '.join(known)}")
        future = self.batcher.submit(job)
        if future is None:
            raise HTTPException(503, f"{self.batcher.max_waiting} requests are waiting already")
        try:
            outputs = await asyncio.wrap_future(future)
        except RewardError as error:
            raise HTTPException(422, str(error)) from None
        except Exception as error:
            # Its words and its place are for those who run the server.
            logger.error("a reward failed: %s", summarize_exception(error))
            text = f"a reward failed: {type(error).__name__}; the log of the server says more"
            raise HTTPException(500, text) from None
        return {"request": number, "outputs": outputs_to_json(outputs)}


def make_server(app: FastAPI, limits: ConnectionLimits) -> uvicorn.Server:
    """
    The server of an app, with limits for its connections.

    Raises:
        ValueError: this process may not open as many files.
    """
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource else float("inf")
    if limits.connections + 4 * _BACKLOG > files:
        raise ValueError(
            f"{limits.connections} connections need {limits.connections + 4 * _BACKLOG} open files, and this process "
            f"may have {files} (ulimit -n)."
        )
    config = uvicorn.Config(
        app,
        http=bounded_protocol(limits),
        ws="none",
        lifespan="off",
        backlog=_BACKLOG,
        access_log=False,
        log_level="warning",
        h11_max_incomplete_event_size=2**14,
        # Whoever holds a connection does not keep the server from ending.
        timeout_graceful_shutdown=10,
    )
    return uvicorn.Server(config)


class HeldBytes:
    """Counts the bytes that requests take in memory, and refuses what would be more than `limit`."""

    def __init__(self, limit: int):
        self.limit, self.number = limit, 0

    @contextmanager
    def by_request(self) -> Iterator[Callable[[int], None]]:
        """A function that says how large one request is by now; what it takes is given back at the end."""
        mine = 0

        def set_size(size: int):
            nonlocal mine
            more = _COPIES * size - mine
            if self.number + more > self.limit:
                raise HTTPException(503, f"requests of {self.limit} bytes are waiting already")
            self.number += more
            mine += more

        try:
            yield set_size
        finally:
            self.number -= mine


async def _read(request: Request, limit: int, hold: Callable[[int], None]) -> bytes:
    """The body of a request, refused as soon as it is larger than `limit`; its size is said to `hold` beforehand."""
    length = request.headers.get("Content-Length", "")
    announced, received, pieces = int(length) if length.isdecimal() else 0, 0, []

    def check():
        size = max(announced, received)
        if size > limit:
            raise HTTPException(413, f"a request may have {limit} bytes")
        hold(size)

    check()
    async for piece in request.stream():
        received += len(piece)
        check()
        pieces.append(piece)
    return b"".join(pieces)


async def _refuse_size(request: Request, error: RequestValidationError) -> JSONResponse:
    return _error(400, f"num_frames must be from 1 to {MAX_FRAMES}, height and width from 1 to {MAX_SIDE}")


async def _refuse(request: Request, error: HTTPException) -> JSONResponse:
    return _error(error.status_code, error.detail)


def _error(status: int, text: object) -> JSONResponse:
    return JSONResponse({"error": one_line(text)}, status)
