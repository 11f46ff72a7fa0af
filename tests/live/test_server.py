"""The server of the page, over real connections: who is let in, and many at a time."""

import json
import threading
import time
from contextlib import ExitStack

import pytest
import requests
import websockets.exceptions

from astrolabe_diffusers.live.session import LiveSession
from tests.live.clients import Client, closed_with, connect_raw, connect_silent, handshake, idle, masked, serving
from tests.pipelines.test_scenes import A
from tests.waiting import wait_for


# Who may


def test_a_token_is_asked_for(model):
    with serving(model, token="secret") as live:
        for query in ("", "?token=wrong", "?token="):
            with Client(live, query) as client:
                assert client.receive()["message"].startswith("this server wants its token")
                with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
                    client.receive()
                assert closed.value.rcvd.code == 1008
        with Client(live, "?token=secret") as client:
            assert client.receive()["type"] == "hello"
        for path, status in (("/health", 200), ("/", 200), ("/recordings/a.mp4", 401), ("/sessions/a.json", 401)):
            assert requests.get(f"http://{live.host}{path}").status_code == status
        # With a token a server may have any name.
        assert requests.get(f"http://{live.host}/", headers={"Host": "my.host:80"}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "http://[", "file://"])
def test_pages_of_others_are_refused(live, origin):
    with pytest.raises(websockets.exceptions.InvalidStatus, match="403"):
        Client(live, additional_headers={"Origin": origin})


def test_its_own_page_is_served(live):
    with Client(live, additional_headers={"Origin": f"http://{live.host}"}) as client:
        assert client.receive()["type"] == "hello"


def test_a_name_that_was_made_to_mean_this_machine_is_refused(live):
    """DNS rebinding: page and socket have the same name, which is not this machine's."""
    for host in ("evil.example", "evil.example:7860", "["):
        assert requests.get(f"http://{live.host}/health", headers={"Host": host}).status_code == 403
    for name in ("localhost", "127.0.0.1", "[::1]"):
        assert requests.get(f"http://{live.host}/health", headers={"Host": f"{name}:80"}).status_code == 200
    with connect_raw(live) as raw:
        raw.sendall(handshake("evil.example", "http://evil.example"))
        assert raw.recv(4096).startswith(b"HTTP/1.1 403")


def test_the_page_loads_nothing_from_elsewhere(live):
    answer = requests.get(f"http://{live.host}/")
    assert "<html" in answer.text and "default-src 'self'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert requests.get(f"http://{live.host}/static/../server.py").status_code == 404
    assert requests.get(f"http://{live.host}/static/%2e%2e/server.py").status_code == 404
    assert requests.get(f"http://{live.host}/docs").status_code == 404


def test_a_large_session_is_saved_beside_the_video(model, monkeypatch):
    """However slowly it is taken: pictures go on, and pings. When the viewer has left it is gone."""
    record = LiveSession.record
    monkeypatch.setattr(LiveSession, "record", lambda self: record(self) | {"start_frames": "A" * 2**24})
    with serving(model, ping_seconds=0.5) as live:
        with Client(live) as client:
            client.start(seed=3).until("pictures")
            url = client.session_url
            with requests.get(url, stream=True) as answer:
                assert answer.headers["Content-Disposition"] == 'attachment; filename="session-3.json"'
                parts = answer.iter_content(2**20)
                data = next(parts)
                for _ in range(8):
                    client.until("pictures", block=client.blocks[-1]["block"] + 2)
                    data += next(parts)
                    time.sleep(0.3)
                data += b"".join(parts)
            saved = json.loads(data)
            assert (saved["seed"], len(saved["start_frames"])) == (3, 2**24)
            assert requests.get(url.replace("/sessions/", "/sessions/a")).status_code == 404
        wait_for(lambda: idle(live), 10)
        assert requests.get(url).status_code == 404


# Many, and gone


def test_three_on_one_slot(model):
    with serving(model) as live, ExitStack() as stack:
        first = stack.enter_context(Client(live)).start(seed=0)
        # Who asks at the same time may come first.
        assert first.until("queue") == {"type": "queue", "position": 0, "sessions": 1, "start": 1}
        second, third = (stack.enter_context(Client(live)).start(seed=i) for i in (1, 2))
        first.until("pictures")
        assert [second.until("queue")["position"], third.until("queue")["position"]] in ([1, 2], [2, 1])
        second, third = sorted((second, third), key=lambda client: client.messages[-1]["position"])
        first.socket.close()
        began = time.monotonic()
        assert second.until("queue")["position"] == 0
        second.until("pictures")
        assert time.monotonic() - began < 3
        assert third.until("queue")["position"] == 1
        with pytest.raises(TimeoutError):
            third.receive(0.3)
        # A reload: the page is gone and comes again, behind those who wait.
        second.socket.close()
        again = stack.enter_context(Client(live)).start()
        third.until("pictures")
        assert again.until("queue")["position"] == 1


def test_no_more_may_wait_than_there_are_places(model):
    with serving(model, engine={"waiting": 1}) as live, ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(Client(live)).start().until("queue")
        late = stack.enter_context(Client(live)).start()
        assert late.until("error")["message"] == "1 viewers are waiting already: come again later."


def test_pages_of_a_full_server(model):
    with serving(model, connections=2) as live, ExitStack() as stack:
        first, _ = (stack.enter_context(Client(live)) for _ in range(2))
        wait_for(lambda: len(live.viewers) == 2)
        with Client(live) as third:
            assert closed_with(third) == "2 pages are open already, and there may be no more: reload it later"
        assert requests.get(f"http://{live.host}/health").status_code == 200
        first.socket.close()
        wait_for(lambda: len(live.viewers) == 1)
        with Client(live) as third:
            assert third.until("hello")


def test_fifty_at_once(model):
    with serving(model, connections=60, engine={"sessions": 2, "waiting": 20}) as live:
        outcomes = []

        def visit(number):
            with Client(live) as client:
                client.start(seed=number)
                while (outcome := client.receive(60)["type"]) not in ("pictures", "error"):
                    pass
                outcomes.append(outcome)

        threads = [threading.Thread(target=visit, args=(number,)) for number in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(90)
        assert len(outcomes) == 50 and outcomes.count("pictures") >= 22
        wait_for(lambda: idle(live))
        with Client(live) as client:
            client.start().until("pictures", block=2)


def test_who_has_gone_without_a_word_is_found_out(model):
    """No answer to a ping, and no end of the connection: a cable that was pulled."""
    with serving(model, ping_seconds=0.5) as live:
        raw = connect_silent(live)
        raw.sendall(masked(json.dumps({"type": "start", "prompt": A, "seed": 0})))
        wait_for(lambda: live.engine.running == 1)
        wait_for(lambda: idle(live), 5)
        raw.close()
