"""Rewards on a server, see `server.py`."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterable
from typing import Any

import requests
import torch

from .frame_request import FrameRequest
from .reward import RewardError, RewardOutput, RewardPlaceError
from .wire import Job, outputs_from_json, pack_job, requests_from_json


# The secret that server and clients share, if they do.
TOKEN_VARIABLE = "ASTROLABE_REWARD_TOKEN"

_CONNECT_SECONDS = 10
# How long a server may be away, to be started anew for example.
_AWAY_SECONDS = 45
_PAUSE_SECONDS = 1.0
_MAX_ANSWER_BYTES = 64 * 2**20


class RemoteRewards:
    """
    Rewards that a server scores. One that is busy is asked again until `timeout` seconds have passed, and one that
    cannot be reached for 45 of them; one that takes longer to answer, or answers nonsense, is not.

    The environment variable ASTROLABE_REWARD_TOKEN holds the server's token, if it has one.

    Args:
        url: `http://host:port`.
        names: the rewards, by the names that they have there.
        timeout: seconds that scoring a batch may take.

    Raises:
        RewardPlaceError: there is no such server.
        ValueError: it does not have all of these rewards.
    """

    def __init__(self, url: str, names: Iterable[str], timeout: float = 300.0):
        self.url, self.names, self.timeout = url.rstrip("/"), list(names), timeout
        self._session = requests.Session()
        # No proxy, and no password of a .netrc, is meant for this server.
        self._session.trust_env = False
        token = os.environ.get(TOKEN_VARIABLE)
        if token:
            self._session.headers["Authorization"] = f"Bearer {token}"
        self._requests: dict[tuple[int, int, int], dict[str, FrameRequest | None]] = {}
        # A server that is not there at the start is a wrong address, not one that is being started anew.
        known = self._ask("GET", "/rewards", retry=False)
        try:
            missing = [name for name in self.names if name not in known["rewards"]]
            self.using_prompts = [name for name in self.names if name in known["using_prompts"]]
            self.max_request_bytes = int(known["max_request_bytes"])
        except (KeyError, TypeError, ValueError):
            raise RewardPlaceError(f"{self.url} is no server of rewards.") from None
        if missing:
            raise ValueError(f"{self.url} has no reward {missing[0]!r}; it has {', '.join(known['rewards'])}.")

    def score(
        self, videos: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None
    ) -> dict[str, RewardOutput]:
        """As `LocalRewards.score`."""
        data = pack_job(Job.make(videos, self._requests_for(videos), prompts, metadata))
        if len(data) > self.max_request_bytes:
            raise RewardPlaceError(
                f"{len(prompts)} videos are {len(data) / 2**20:.3g} MB, and {self.url} takes "
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
            raise RewardPlaceError(f"{self.url} answered nonsense: {error}") from error

    def _requests_for(self, videos: torch.Tensor) -> dict[str, FrameRequest | None]:
        shape = (videos.shape[1], *videos.shape[-2:])
        if shape not in self._requests:
            query = dict(zip(("num_frames", "height", "width"), shape))
            answer = self._ask("GET", "/requests", params=query)
            try:
                everything = requests_from_json(answer)
                self._requests[shape] = {name: everything[name] for name in self.names}
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise RewardPlaceError(f"{self.url} answered nonsense: {type(error).__name__} {error}") from error
        return self._requests[shape]

    def _ask(self, method: str, path: str, retry: bool = True, **arguments: Any) -> Any:
        """The JSON that the server answers."""
        deadline = time.monotonic() + self.timeout
        away_since = None
        while True:
            try:
                with self._session.request(
                    method,
                    self.url + path,
                    # The time that is left, for the connection and for each piece of the answer.
                    timeout=(_CONNECT_SECONDS, max(deadline - time.monotonic(), 0.1)),
                    stream=True,
                    allow_redirects=False,
                    **arguments,
                ) as response:
                    body = _read(response, deadline)
                    if response.status_code != 503:
                        return self._answer(response.status_code, body)
                    problem, away_since, until = "is busy", None, deadline
            except (requests.ReadTimeout, TimeoutError):
                raise RewardPlaceError(f"{self.url} did not answer within {self.timeout:g} s.") from None
            except requests.RequestException as error:
                problem = f"cannot be reached ({type(error).__name__})"
                away_since = away_since or time.monotonic()
                until = min(deadline, away_since + _AWAY_SECONDS)
            if not retry or time.monotonic() + _PAUSE_SECONDS > until:
                raise RewardPlaceError(f"{self.url} {problem}.")
            time.sleep(_PAUSE_SECONDS)

    def _answer(self, status: int, body: bytes) -> Any:
        try:
            answer = requests.compat.json.loads(body)
        except ValueError:
            start = body[:80].decode(errors="replace")
            raise RewardPlaceError(f"{self.url} answered nonsense, with status {status}: {start!r}") from None
        if status == 200:
            return answer
        error = answer.get("error") if isinstance(answer, dict) else None
        if status == 401:
            error = f"it wants its token in {TOKEN_VARIABLE}"
        # The reward's own refusal, which a run may be configured to skip.
        kind = RewardError if status == 422 else RewardPlaceError
        raise kind(f"{self.url} refused, with status {status}: {error or answer}")

    def close(self):
        self._session.close()


def _read(response: requests.Response, deadline: float) -> bytes:
    """The body, unless it comes too slowly or is too long."""
    body = bytearray()
    for piece in response.iter_content(2**16):
        body += piece
        if time.monotonic() > deadline:
            raise TimeoutError
        if len(body) > _MAX_ANSWER_BYTES:
            break
    return bytes(body)
