"""Connections over which an answer goes out slowly."""

import socket
import time

import pytest
from fastapi import FastAPI
from fastapi.responses import FileResponse, Response

from astrolabe_diffusers.serving.binding import bind
from astrolabe_diffusers.serving.bounded_protocol import ConnectionLimits, make_server
from astrolabe_diffusers.serving.running import in_thread


SIZE = 2**25
SECONDS = 1.0


@pytest.fixture
def answer(tmp_path):
    """Asks a server for an answer of `SIZE` bytes, and yields the connection, which has taken nothing of it."""
    path = tmp_path / "large"
    path.write_bytes(bytes(SIZE))
    app = FastAPI()
    app.add_api_route("/file", lambda: FileResponse(path))
    app.add_api_route("/whole", lambda: Response(bytes(SIZE)))
    with (
        bind("127.0.0.1", 0) as listener,
        in_thread(make_server(app, ConnectionLimits(seconds=SECONDS)), listener) as address,
        socket.socket() as client,
    ):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        client.settimeout(10)
        host, port = address.split(":")
        client.connect((host, int(port)))

        def ask(path):
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
            return client

        yield ask


def take(client, seconds=0.0):
    """How many bytes come before the connection ends, in `seconds` at the least for all of them."""
    began, taken = time.monotonic(), 0
    try:
        while data := client.recv(2**16):
            taken += len(data)
            time.sleep(max(began + seconds * taken / SIZE - time.monotonic(), 0))
    except ConnectionResetError:
        pass
    return taken


@pytest.mark.parametrize("path", ["/file", "/whole"])
def test_who_takes_a_large_answer_slowly_gets_it(answer, path):
    assert take(answer(path), 5 * SECONDS) > SIZE


@pytest.mark.parametrize("path", ["/file", "/whole"])
def test_who_takes_no_more_of_it_is_left(answer, path):
    client = answer(path)
    client.recv(2**16)
    time.sleep(2 * SECONDS)
    assert take(client) < SIZE
