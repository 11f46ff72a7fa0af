"""Rewards on a server, see `server.py`."""

import functools
import os
import time
import uuid
from collections.abc import Iterable
from typing import Any

from ...files.text import parse_json
from ..frames import FrameRequest
from ..http_client import HttpClient, UnreachableError
from ..reward import Closing, RewardError, RewardOutput, RewardPlacementError
from .wire import VERSION, ScoringJob, outputs_from_json, pack_job, requests_from_json


# The secret that server and clients share, if they do.
TOKEN_VARIABLE = "ASTROLABE_REWARD_TOKEN"

# How long a server may be away, to be started anew for example.
_AWAY_SECONDS = 45
_PAUSE_SECONDS = 1.0


class RemoteRewards(Closing):
    """
    Rewards that a server scores. One that is busy is asked again until `timeout` seconds have passed, and one that
    cannot be reached for 45 of them; one that takes longer to answer, or answers nonsense, is not.

    Args:
        url: `http://host:port`. ASTROLABE_REWARD_TOKEN in the environment is its token, if it has one.
        names: the rewards, by the names that they have there.
        timeout: seconds that scoring a batch may take.
        fps: frames a second of the videos, if they are known.

    Raises:
        RewardPlacementError: there is no such server, or it is of another release.
        ValueError: it does not have all of these rewards, or has one for videos of other frames a second.
    """

    def __init__(self, url: str, names: Iterable[str], timeout: float = 300.0, fps: float | None = None):
        self.names, self.timeout = list(names), timeout
        self._client = HttpClient(url, os.environ.get(TOKEN_VARIABLE), TOKEN_VARIABLE)
        self._requests = functools.cache(self._ask_requests)
        # A server that is not there at the start is a wrong address, not one that is being started anew.
        known = self._ask("GET", "/rewards", retry=False)
        try:
            there, using_prompts = ([str(name) for name in known[key]] for key in ("rewards", "using_prompts"))
            self.max_request_bytes, version = int(known["max_request_bytes"]), int(known.get("version", 1))
            # Of all rewards that it has: a frame or two more than is looked at may travel.
            self.num_context_frames = int(known.get("num_context_frames", 0))
            assumed = {str(name): float(rate) for name, rate in known.get("fps", {}).items()}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise RewardPlacementError(f"{self} is no server of rewards.") from None
        if version != VERSION:
            raise RewardPlacementError(
                f"{self} speaks version {version} of the exchange and this installation {VERSION}: both need the same "
                "release of astrolabe_diffusers."
            )
        for name in self.names:
            if name not in there:
                raise ValueError(f"{self} has no reward {name!r}; it has {self._client.quote(', '.join(there))}.")
            if fps and assumed.get(name, fps) != fps:
                raise ValueError(
                    f"{self} scores {name} as of {assumed[name]:g} frames a second, and these videos have {fps:g}: "
                    f"serve it with --reward_options {name}.fps={fps:g}."
                )
        self.using_prompts = [name for name in self.names if name in using_prompts]

    def __str__(self):
        return self._client.name

    def score(self, videos, prompts, metadata, context=None) -> dict[str, RewardOutput]:
        """As `LocalRewards.score`."""
        requests = self._requests(videos.shape[1], *videos.shape[-2:])
        data = pack_job(ScoringJob.make(videos, requests, prompts, metadata, context, self.num_context_frames))
        if len(data) > self.max_request_bytes:
            raise RewardPlacementError(
                f"{len(prompts)} videos are {len(data) / 2**20:.3g} MB, and {self} takes "
                f"{self.max_request_bytes / 2**20:.3g} MB a request: make batches smaller, or its --max_request_mb "
                "larger."
            )
        number = uuid.uuid4().hex
        answer = self._ask("POST", "/score", data=data, headers={"X-Request-Id": number})
        try:
            if answer["request"] != number:
                raise ValueError("it is the answer to another request")
            return outputs_from_json(answer["outputs"], self.names, len(prompts))
        except (KeyError, TypeError, ValueError) as error:
            raise RewardPlacementError(f"{self} answered nonsense: {self._client.quote(error)}") from error

    def _ask_requests(self, num_frames: int, height: int, width: int) -> dict[str, FrameRequest | None]:
        answer = self._ask("GET", "/requests", params={"num_frames": num_frames, "height": height, "width": width})
        try:
            requests = requests_from_json(answer)
            return {name: requests[name] for name in self.names}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RewardPlacementError(f"{self} answered nonsense: {type(error).__name__}") from error

    def _ask(self, method: str, path: str, retry: bool = True, **arguments: Any) -> Any:
        """The JSON that the server answers."""
        deadline = time.monotonic() + self.timeout
        away_since = None
        while True:
            try:
                left = max(deadline - time.monotonic(), 0.1)
                status, body, _ = self._client.ask(method, path, timeout=left, **arguments)
                if status != 503:
                    return self._answer(status, body)
                problem, away_since, until = f"{self} is busy.", None, deadline
            except UnreachableError as error:
                problem = str(error)
                away_since = away_since or time.monotonic()
                until = min(deadline, away_since + _AWAY_SECONDS)
            if not retry or time.monotonic() + _PAUSE_SECONDS > until:
                raise RewardPlacementError(problem)
            time.sleep(_PAUSE_SECONDS)

    def _answer(self, status: int, body: bytes) -> Any:
        try:
            answer = parse_json(body, "the answer")
        except ValueError:
            raise RewardPlacementError(f"{self} answered nonsense, with status {status}: it is no JSON.") from None
        if status == 200:
            return answer
        error = answer.get("error") if isinstance(answer, dict) else None
        if status == 401:
            error = f"it wants its token in {TOKEN_VARIABLE}"
        # A reward's score that is none, which a run may be configured to skip, and what it says of such videos.
        kind = {422: RewardError, 400: ValueError}.get(status, RewardPlacementError)
        raise kind(f"{self} refused, with status {status}: {self._client.quote(error or 'it does not say why')}")

    def close(self):
        self._client.close()
