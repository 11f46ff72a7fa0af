"""Rewards for several clients, over HTTP.

Errors are `{"error": text}`: 400 no job, or videos that a reward does not take, 401 no token, 413 too large, 422 no
reward is what one returned, 500 it failed (its own words are in the log), 503 busy.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

from ...errors import one_line, summarize_exception
from ...serving.binding import names_this_machine
from ..reward import RewardError
from .batcher import Batcher
from .local import LocalRewards
from .wire import VERSION, outputs_to_json, requests_to_json, unpack_job


try:
    from fastapi import APIRouter, FastAPI, HTTPException, Query, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, PlainTextResponse
    from starlette.requests import ClientDisconnect

    from ...serving.bounded_protocol import ConnectionLimits
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


router = APIRouter()


@router.get("/health")
async def health():
    """Without a token."""
    return {"status": "ok"}


@router.get("/rewards")
async def names(request: Request):
    rewards = request.app.state.batcher.rewards
    return {
        "rewards": list(rewards.rewards),
        "using_prompts": rewards.using_prompts,
        "num_context_frames": rewards.num_context_frames,
        "fps": rewards.assumed_fps,
        "max_request_bytes": request.app.state.held.each,
        "version": VERSION,
    }


@router.get("/requests")
async def requests(request: Request, num_frames: _Frames, height: _Side, width: _Side):
    """What each reward needs of such videos; 400 if one cannot take them."""
    try:
        needed = request.app.state.batcher.rewards.requests(num_frames, height, width)
    except ValueError as error:
        raise HTTPException(400, str(error)) from None
    return JSONResponse(requests_to_json(needed))


@router.get("/metrics")
async def metrics(request: Request):
    """In the text format of Prometheus."""
    state = request.app.state
    counters = state.batcher.counters
    lines = ["# TYPE astrolabe_reward_responses_total counter"]
    statuses = sorted(key for key in counters if key.startswith("status_"))
    lines += [f'astrolabe_reward_responses_total{{status="{key[7:]}"}} {counters[key]}' for key in statuses]
    values = {f"{key}_total": counters[key] for key in ("videos", "batches", "seconds")}
    values["refused_connections_total"] = state.limits.refused
    values |= {"waiting": len(state.batcher.waiting), "waiting_bytes": state.held.number}
    for key, value in values.items():
        kind = "counter" if key.endswith("_total") else "gauge"
        lines += [f"# TYPE astrolabe_reward_{key} {kind}", f"astrolabe_reward_{key} {value}"]
    return PlainTextResponse("\n".join(lines) + "\n")


@router.post("/score")
async def score(request: Request):
    """The scores of a job (`pack_job`), and the header X-Request-Id."""
    state = request.app.state
    with state.held.by_request() as hold:
        try:
            # What was read is let go of as soon as it is unpacked.
            job = await asyncio.to_thread(unpack_job, await _read(request, hold))
        except (ClientDisconnect, ValueError) as error:  # nobody is there to read of the first
            raise HTTPException(400, str(error)) from None
        known = state.batcher.rewards.rewards
        unknown = [name for name in job.frames if name not in known]
        if unknown:
            raise HTTPException(400, f"there is no reward {unknown[0]!r}; there are {', '.join(known)}")
        future = state.batcher.submit(job)
        if future is None:
            raise HTTPException(503, f"{state.batcher.max_waiting} requests are waiting already")
        try:
            outputs = await asyncio.wrap_future(future)
        except RewardError as error:
            raise HTTPException(422, str(error)) from None
        except ValueError as error:  # what a reward says of videos and prompts that it cannot take
            raise HTTPException(400, str(error)) from None
        except Exception as error:
            # Its words and its place are for those who run the server.
            logger.error("a reward failed: %s", summarize_exception(error))
            text = f"a reward failed: {type(error).__name__}; the log of the server says more"
            raise HTTPException(500, text) from None
        return {"request": request.headers.get("X-Request-Id"), "outputs": outputs_to_json(outputs)}


class HeldBytes:
    """Counts the bytes that requests take in memory; refuses one of more than `each`, and what would be more than
    `limit` for all."""

    def __init__(self, each: int, limit: int):
        self.each, self.limit, self.number = each, limit, 0

    @contextmanager
    def by_request(self) -> Iterator[Callable[[int], None]]:
        """A function that says how large one request is by now; what it takes is given back at the end."""
        mine = 0

        def set_size(size: int):
            nonlocal mine
            if size > self.each:
                raise HTTPException(413, f"a request may have {self.each} bytes")
            more = _COPIES * size - mine
            if self.number + more > self.limit:
                raise HTTPException(503, f"requests of {self.limit} bytes are waiting already")
            self.number += more
            mine += more

        try:
            yield set_size
        finally:
            self.number -= mine


async def _read(request: Request, hold: Callable[[int], None]) -> bytes:
    """The body of a request, whose size is said to `hold` beforehand."""
    length = request.headers.get("Content-Length", "")
    announced, received, pieces = int(length) if length.isdecimal() else 0, 0, []
    hold(announced)
    async for piece in request.stream():
        received += len(piece)
        hold(max(announced, received))
        pieces.append(piece)
    return b"".join(pieces)


async def _refuse_size(request: Request, error: RequestValidationError) -> JSONResponse:
    return _error(400, f"num_frames must be from 1 to {MAX_FRAMES}, height and width from 1 to {MAX_SIDE}")


async def _refuse(request: Request, error: HTTPException) -> JSONResponse:
    return _error(error.status_code, error.detail)


def _error(status: int, text: object) -> JSONResponse:
    return JSONResponse({"error": one_line(text)}, status)


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
    The server of these rewards. Arguments are those of `astrolabe serve`, and

    Args:
        token: what clients have to send as `Authorization: Bearer TOKEN`, if anything; see [`check_binding`].
        limits: of the connections, whose count of refused ones is among the metrics.
    """
    # No pages of documentation: they load scripts from elsewhere.
    app = FastAPI(
        title="astrolabe_diffusers rewards",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        exception_handlers={RequestValidationError: _refuse_size, HTTPException: _refuse},
    )
    app.include_router(router)
    app.state.batcher = Batcher(rewards, max_batch, max_waiting)
    app.state.held = HeldBytes(max_request_bytes, max_waiting_bytes)
    app.state.limits = limits or ConnectionLimits()

    @app.middleware("http")
    async def check_token(request: Request, call_next):
        given = request.headers.get("Authorization", "").encode()
        if not token and not names_this_machine(request.headers.get("Host", "")):
            response = _error(403, "without a token this server answers to names of its machine alone")
        elif token and request.url.path != "/health" and not secrets.compare_digest(given, f"Bearer {token}".encode()):
            response = _error(401, "no token, or a wrong one")
        else:
            response = await call_next(request)
        app.state.batcher.counters[f"status_{response.status_code}"] += 1
        return response

    return app
