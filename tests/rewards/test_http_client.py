"""What servers and addresses can do to the client of rewards and of the judge."""

import socket
import threading
import time
from contextlib import contextmanager

import pytest

from astrolabe_diffusers.rewards import RewardPlacementError
from astrolabe_diffusers.rewards.http_client import HttpClient, UnreachableError, split_url
from tests.rewards.http_server import answering


KEY = "sk-very-secret"


@contextmanager
def raw_server(behave):
    """A server that does `behave(connection)` with each connection; yields its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    try:
                        behave(connection)
                    except OSError:
                        pass

        threading.Thread(target=run, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def test_an_answer_is_status_body_and_when_to_come_again():
    seen = {}

    def answer(path, headers, body):
        seen.update(path=path, body=body, key=headers["Authorization"])
        return 200, b"yes"

    with answering(answer) as url:
        assert HttpClient(f"{url}/v1/", KEY).ask("POST", "/ask", timeout=5, data=b"frames") == (200, b"yes", None)
    assert seen == {"path": "/v1/ask", "body": b"frames", "key": f"Bearer {KEY}"}


def test_no_redirect_is_followed():
    """Neither frames nor the key reach the place that an answer names."""
    reached = []
    with answering(lambda path, headers, body: reached.append(path) or (200, b"")) as elsewhere:

        def behave(connection):
            connection.recv(2**16)
            connection.sendall(
                f"HTTP/1.1 307 Away\r\nLocation: {elsewhere}/x\r\nContent-Length: 0\r\n\r\n".encode()
            )

        with raw_server(behave) as url:
            assert HttpClient(url, KEY).ask("POST", timeout=5, data=b"frames")[0] == 307
    assert not reached


def test_an_answer_that_is_too_long_is_not_read():
    sent = []

    def behave(connection):
        connection.recv(2**16)
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:  # as long as somebody reads
            sent.append(connection.send(bytes(2**16)))

    with raw_server(behave) as url:
        with pytest.raises(RewardPlacementError, match="answered more than 100000 bytes"):
            HttpClient(url, max_answer_bytes=100_000).ask("GET", timeout=10)
    assert sum(sent) < 2**25


HEADERS = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n"


@pytest.mark.parametrize("before", [b"", b"HTTP/1.1 200 OK\r\n", HEADERS + b"\r\n"], ids=["status", "headers", "body"])
def test_what_drips_is_too_slow_in_the_end(before):
    """Every piece comes in time; the whole does not."""

    def behave(connection):
        connection.recv(2**16)
        connection.sendall(before)
        while True:  # for ever, if nobody ends it
            connection.sendall(b"X")
            time.sleep(0.05)

    with raw_server(behave) as url:
        started = time.monotonic()
        with pytest.raises(RewardPlacementError, match="did not answer within 0.4 s") as error:
            HttpClient(url).ask("GET", timeout=0.4)
        assert time.monotonic() - started < 2 and not isinstance(error.value, UnreachableError)
        assert_ended("http")


def assert_ended(name):
    """No thread of that name is left, in a while."""
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join(3)
            assert not thread.is_alive()


def test_a_server_that_does_not_read_is_too_slow():
    done = threading.Event()
    with raw_server(lambda connection: done.wait(5)) as url:
        with pytest.raises(RewardPlacementError, match="did not answer within 0.4 s"):
            HttpClient(url).ask("POST", timeout=0.4, data=bytes(2**25))
        assert_ended("http")
        done.set()


def test_errors_name_the_host_and_no_secret():
    with pytest.raises(UnreachableError) as error:
        HttpClient("http://someone:pass%40word@127.0.0.1:9/v1").ask("GET", "/x", timeout=5)
    assert str(error.value) == "http://127.0.0.1:9/v1 cannot be reached (ConnectionError)."
    client = HttpClient("http://someone:pass%40word@127.0.0.1:9")
    assert client.quote("no\n user  someone, pass@word\x1b[31m") == "no user ..., ...?[31m"
    assert HttpClient("http://a", KEY).quote(f"wrong key {KEY}" + "x" * 300) == "wrong key ..." + "x" * 187 + "..."


def test_user_and_password_of_an_address_are_sent():
    seen = []
    with answering(lambda path, headers, body: seen.append(headers["Authorization"]) or (200, b"")) as url:
        HttpClient(url.replace("//", "//user:p%40ss@")).ask("GET", timeout=5)
    assert seen == ["Basic dXNlcjpwQHNz"]  # user:p@ss


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://host", "http://", "http://host:port", "http://host:99999", "file:///etc/passwd",
            "http://host/?key=1", "http://[::1"],
)  # fmt: skip
def test_what_is_no_address(url):
    with pytest.raises(ValueError, match="an address of a server must be http://host:port"):
        HttpClient(url)


def test_addresses():
    assert split_url("https://u:p@[::1]:8000/v1/") == ("https://[::1]:8000/v1", ("u", "p"))
    assert split_url("http://host") == ("http://host", None)


@pytest.mark.parametrize("key", ["two\nlines", "with blank", "schlüssel"])
def test_a_key_that_no_header_can_have(key):
    with pytest.raises(ValueError, match="MY_KEY holds a blank, a line break or another") as error:
        HttpClient("http://host", key, "MY_KEY")
    assert key not in str(error.value)


def test_a_key_and_a_user():
    with pytest.raises(ValueError, match="http://host is given a user and MY_KEY; a request can have one of them"):
        HttpClient("http://u:p@host", KEY, "MY_KEY")


def test_only_https_goes_through_a_proxy(monkeypatch):
    with answering(lambda *request: (200, b"")) as url:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        assert HttpClient(url).ask("GET", timeout=5)[0] == 200
    asked = []

    def behave(connection):
        asked.append(connection.recv(2**16))
        connection.sendall(b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n")

    with raw_server(behave) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy)
        with pytest.raises(UnreachableError, match=r"https://judge.example cannot be reached \(ProxyError\)"):
            HttpClient("https://judge.example", KEY).ask("GET", timeout=5)
    assert asked[0].startswith(b"CONNECT judge.example:443") and KEY.encode() not in asked[0]
