"""Requests to servers of rewards and to judges, whose answers nobody vouches for."""

import os
import socket
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from typing import Any
from urllib.parse import unquote

import requests
from requests.adapters import HTTPAdapter
from requests.utils import get_environ_proxies
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import LocationParseError
from urllib3.util import Url, parse_url

from ..errors import one_line
from ..serving.binding import check_key
from .reward import RewardPlacementError


_CONNECT_SECONDS = 10
_MAX_CONNECTIONS = 64
_MAX_QUOTE = 200


class UnreachableError(RewardPlacementError):
    """There was no connection, or it broke."""


# The connections that the exchange of a thread uses, to be broken when its time is over.
_thread = threading.local()


class _Noted:
    def connect(self):
        _thread.connections.append(self)
        super().connect()

    def request(self, *arguments, **keywords):
        _thread.connections.append(self)
        super().request(*arguments, **keywords)


_CONNECTIONS = {kind: type(kind.__name__, (_Noted, kind), {}) for kind in (HTTPConnection, HTTPSConnection)}


class _Adapter(HTTPAdapter):
    def get_connection_with_tls_context(self, *arguments, **keywords):
        pool = super().get_connection_with_tls_context(*arguments, **keywords)
        pool.ConnectionCls = _CONNECTIONS.get(pool.ConnectionCls, pool.ConnectionCls)
        return pool


class HttpClient:
    """
    Requests to one server. Frames, prompts and the key go to this address and nowhere else, so no redirect is
    followed; an answer is bounded in length and in time, from the look-up of the name to the last byte; and of the
    environment nothing is used but, for https, HTTPS_PROXY with NO_PROXY and REQUESTS_CA_BUNDLE.

    Args:
        url: `http://host:port/path` or https, or a `ValueError`; a user and a password in it are sent and never shown.
        key, key_name: sent as `Authorization: Bearer KEY`, and where it is from, for the error if it cannot be.
        max_answer_bytes: longer answers are an error.
    """

    def __init__(self, url: str, key: str | None = None, key_name: str = "the key", max_answer_bytes: int = 2**26):
        self.name, user = split_url(url)
        self.max_answer_bytes = max_answer_bytes
        self._secrets = [secret for secret in (key, *(user or ())) if secret]
        self._session = requests.Session()
        # No password of a .netrc is meant for this server.
        self._session.trust_env = False
        if self.name.startswith("https:"):
            self._session.proxies = get_environ_proxies(self.name)
            self._session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, _Adapter(pool_maxsize=_MAX_CONNECTIONS))
        # What is unpacked could be a thousand times as long.
        self._session.headers["Accept-Encoding"] = "identity"
        self._session.auth = user
        if key:
            check_key(key, key_name)
            if user:
                raise ValueError(f"{self.name} is given a user and {key_name}; a request can have one of them.")
            self._session.headers["Authorization"] = f"Bearer {key}"

    def ask(self, method: str, path: str = "", *, timeout: float, **arguments: Any) -> tuple[int, bytes, str | None]:
        """
        The status, the body and the header Retry-After of an answer, all within `timeout` seconds. `path` comes after
        the address; other arguments are those of `requests.request`.

        Raises:
            UnreachableError: there is no connection.
            RewardPlacementError: it was too slow, or its answer too long.
        """
        answer, used = Future(), []

        def exchange():
            _thread.connections = used
            try:
                answer.set_result(self._exchange(method, path, timeout, arguments))
            except Exception as error:
                answer.set_exception(error)

        # A time-out of a socket is one of each of its steps: a server that drips headers keeps within it for ever.
        threading.Thread(target=exchange, name="http", daemon=True).start()
        try:
            return answer.result(timeout)
        except (TimeoutError, requests.ReadTimeout):
            for connection in used:
                with suppress(OSError, AttributeError):  # it is closed, or not made yet
                    connection.sock.shutdown(socket.SHUT_RDWR)  # which ends the thread
            raise RewardPlacementError(f"{self.name} did not answer within {round(timeout, 1):g} s.") from None
        except requests.RequestException as error:
            # Its text may hold the address with all that is in it.
            raise UnreachableError(f"{self.name} cannot be reached ({type(error).__name__}).") from None

    def _exchange(self, method: str, path: str, timeout: float, arguments: dict[str, Any]):
        deadline = time.monotonic() + timeout
        arguments |= {"timeout": (_CONNECT_SECONDS, timeout), "stream": True, "allow_redirects": False}
        with self._session.request(method, self.name + path, **arguments) as response:
            body = bytearray()
            for piece in response.iter_content(2**16):
                body += piece
                if time.monotonic() > deadline:
                    raise TimeoutError
                if len(body) > self.max_answer_bytes:
                    raise RewardPlacementError(f"{self.name} answered more than {self.max_answer_bytes} bytes.")
            return response.status_code, bytes(body), response.headers.get("Retry-After")

    def quote(self, text: object) -> str:
        """What a server said, fit for an error: one short line without what was sent to it in confidence."""
        line = one_line(text)
        for secret in self._secrets:
            line = line.replace(secret, "...")
        line = "".join(c if c.isprintable() else "?" for c in line)
        return line[:_MAX_QUOTE] + "..." * (len(line) > _MAX_QUOTE)

    def close(self):
        self._session.close()


def split_url(url: str) -> tuple[str, tuple[str, str] | None]:
    """An address without user and password, and these; `ValueError` if it is none."""
    try:
        parts = parse_url(url.strip())
    except LocationParseError:
        parts = Url()
    if parts.scheme not in ("http", "https") or not parts.host or parts.query or parts.fragment:
        raise ValueError("an address of a server must be http://host:port or https://host:port, with a path if any.")
    name, _, password = (parts.auth or "").partition(":")
    user = None if parts.auth is None else (unquote(name), unquote(password))
    return f"{parts.scheme}://{parts.netloc}{(parts.path or '').rstrip('/')}", user
