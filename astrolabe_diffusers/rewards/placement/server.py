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
import resource
import secrets
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Annotated

from ...errors import one_line, summarize_exception
from ..http_client import check_key
from ..reward import RewardError
from .cached_rewards import CachedRewards
from .local import LocalRewards
from .remote import TOKEN_VARIABLE
from .wire import VERSION, ScoringJob, outputs_to_json, requests_to_json, unpack_job


try:
    import uvicorn
    from fastapi import FastAPI, Query, Request
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
# Connections that wait to be accepted, which are open files too.
_BACKLOG = 64


class Batcher:
    """
    Scores jobs one after the other in a thread, and together those that wait, ask the same rewards and have videos of
    one shape. If a batch fails, each of its jobs is scored alone: a client does not suffer from another's videos.

    Args:
        rewards: the rewards.
        max_batch: videos that are scored together at most, unless one job alone has more.
        max_waiting: jobs that may wait.
    """

    def __init__(self, rewards: LocalRewards, max_batch: int, max_waiting: int):
        self.rewards, self.max_batch, self.max_waiting = rewards, max_batch, max_waiting
        self.counters: Counter[str] = Counter()
        self._waiting: deque[tuple[ScoringJob, Future]] = deque()
        self._changed = threading.Condition()
        threading.Thread(target=self._work, name="rewards", daemon=True).start()

    def submit(self, job: ScoringJob) -> Future | None:
        """The outputs by reward as a future; `None` if too many jobs are waiting."""
        with self._changed:
            if len(self._waiting) >= self.max_waiting:
                return None
            future = Future()
            self._waiting.append((job, future))
            self._changed.notify()
            return future

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def _work(self):
        while True:
            batch = self._next_batch()
            started = time.perf_counter()
            try:
                self._score([job for job, _ in batch], [future for _, future in batch])
            except Exception as error:
                if len(batch) == 1:
                    batch[0][1].set_exception(error)
                else:
                    self._score_each(batch)
            self.counters["batches"] += 1
            self.counters["videos"] += sum(len(job.prompts) for job, _ in batch)
            self.counters["seconds"] += time.perf_counter() - started

    def _score_each(self, batch: list[tuple[ScoringJob, Future]]):
        for job, future in batch:
            try:
                self._score([job], [future])
            except Exception as error:
                future.set_exception(error)

    def _next_batch(self) -> list[tuple[ScoringJob, Future]]:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting)
            batch, rest, size = [], deque(), 0
            for job, future in self._waiting:
                fits = not batch or (_kind(job) == _kind(batch[0][0]) and size + len(job.prompts) <= self.max_batch)
                if not fits:
                    rest.append((job, future))
                elif future.set_running_or_notify_cancel():
                    batch.append((job, future))
                    size += len(job.prompts)
            self._waiting = rest
            return batch

    def _score(self, jobs: list[ScoringJob], futures: list[Future]):
        outputs = self.rewards.score_job(jobs[0] if len(jobs) == 1 else ScoringJob.join(jobs))
        start = 0
        for job, future in zip(jobs, futures):
            end = start + len(job.prompts)
            future.set_result({name: output[start:end] for name, output in outputs.items()})
            start = end


def _kind(job: ScoringJob):
    """Jobs of one kind can be scored together."""
    return job.whole, {name: tensor.shape[1:] for name, tensor in job.frames.items()}


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
        token: clients must send it as `Authorization: Bearer TOKEN`.
        max_request_bytes: larger requests are refused before they are read.
        max_batch, max_waiting: as in `Batcher`.
        max_waiting_bytes: of all requests that are read, wait or are scored; a client asks again later.
        limits: of the connections, whose count of refused ones is among the metrics.
    """
    if token:
        check_key(token, TOKEN_VARIABLE)
    # No pages of documentation: they load scripts from elsewhere.
    app = FastAPI(title="astrolabe_diffusers rewards", docs_url=None, redoc_url=None, openapi_url=None)
    batcher = Batcher(rewards, max_batch, max_waiting)
    counters = batcher.counters
    limits = limits or ConnectionLimits()
    held = HeldBytes(max_waiting_bytes)

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError):
        return _error(400, f"num_frames must be from 1 to {MAX_FRAMES}, height and width from 1 to {MAX_SIDE}")

    @app.middleware("http")
    async def check_token(request: Request, call_next):
        given = request.headers.get("Authorization", "").encode()
        if token and request.url.path != "/health" and not secrets.compare_digest(given, f"Bearer {token}".encode()):
            response = _error(401, "no token, or a wrong one")
        else:
            response = await call_next(request)
        counters[f"status_{response.status_code}"] += 1
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
    async def requests(
        num_frames: Annotated[int, Query(ge=1, le=MAX_FRAMES)],
        height: Annotated[int, Query(ge=1, le=MAX_SIDE)],
        width: Annotated[int, Query(ge=1, le=MAX_SIDE)],
    ):
        return JSONResponse(requests_to_json(rewards.requests(num_frames, height, width)))

    @app.get("/metrics")
    async def metrics():
        statuses = sorted(key for key in counters if key.startswith("status_"))
        lines = [
            "# TYPE astrolabe_reward_responses_total counter",
            *(f'astrolabe_reward_responses_total{{status="{key[7:]}"}} {counters[key]}' for key in statuses),
        ]
        totals = {key: counters[key] for key in ("videos", "batches", "seconds")}
        if isinstance(rewards, CachedRewards):
            totals["cache_hits"] = rewards.cache_hits
        totals["refused_connections"] = limits.refused
        for key, value in totals.items():
            lines += [f"# TYPE astrolabe_reward_{key}_total counter", f"astrolabe_reward_{key}_total {value}"]
        totals = {"waiting": batcher.num_waiting, "waiting_bytes": held.number}
        for key, value in totals.items():
            lines += [f"# TYPE astrolabe_reward_{key} gauge", f"astrolabe_reward_{key} {value}"]
        return PlainTextResponse("\n".join(lines) + "\n")

    @app.post("/score")
    async def score(request: Request):
        with held.by_request() as mine:
            try:
                data = await _read(request, max_request_bytes, mine)
            except HeldBytes.Full:
                return _error(503, f"requests of {max_waiting_bytes} bytes are waiting already")
            except ClientDisconnect:
                return _error(400, "the connection ended before the request did")
            if data is None:
                return _error(413, f"a request may have {max_request_bytes} bytes")
            return await answer(data, request.headers.get("X-Request-Id"))

    async def answer(data: bytes, number: str | None):
        try:
            job = await asyncio.to_thread(unpack_job, data)
        except ValueError as error:
            return _error(400, error)
        unknown = [name for name in job.frames if name not in rewards.rewards]
        if unknown:
            return _error(400, f"there is no reward {unknown[0]!r}; there are {', '.join(rewards.rewards)}")
        future = batcher.submit(job)
        if future is None:
            return _error(503, f"{max_waiting} requests are waiting already")
        try:
            outputs = await asyncio.wrap_future(future)
        except RewardError as error:
            return _error(422, error)
        except Exception as error:
            # Its words and its place are for those who run the server.
            logger.error("a reward failed: %s", summarize_exception(error))
            return _error(500, f"a reward failed: {type(error).__name__}; the log of the server says more")
        return {"request": number, "outputs": outputs_to_json(outputs)}

    return app


def make_server(app: FastAPI, limits: ConnectionLimits) -> uvicorn.Server:
    """
    The server of an app, with limits for its connections.

    Raises:
        ValueError: this process may not open as many files.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
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
    """Counts the bytes of requests that are in memory, and raises `Full` for what would be more than `limit`."""

    class Full(Exception):
        pass

    def __init__(self, limit: int):
        self.limit, self.number = limit, 0

    @contextmanager
    def by_request(self) -> Iterator[Callable[[int], None]]:
        """A function that says how many bytes one request has by now; they are given back at the end."""
        mine = 0

        def set_number(number: int):
            nonlocal mine
            if self.number - mine + number > self.limit:
                raise HeldBytes.Full
            self.number += number - mine
            mine = number

        try:
            yield set_number
        finally:
            self.number -= mine


async def _read(request: Request, limit: int, hold: Callable[[int], None]) -> bytes | None:
    """The body of a request, or `None` as soon as it is larger than that; its size is said to `hold` beforehand."""
    length = request.headers.get("Content-Length", "")
    announced = int(length) if length.isdecimal() else 0
    if announced > limit:
        return None
    hold(announced)
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > limit:
            return None
        hold(max(announced, len(data)))
    return bytes(data)


def _error(status: int, text: object) -> JSONResponse:
    return JSONResponse({"error": one_line(text)}, status)
