"""The server of rewards, over real connections."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import requests
import torch
from safetensors.torch import save

from astrolabe_diffusers.rewards import RewardError, RewardPlacementError, RewardSet
from astrolabe_diffusers.rewards.placement.local import LocalRewards
from astrolabe_diffusers.rewards.placement.server import create_app
from astrolabe_diffusers.rewards.placement.wire import ScoringJob, pack_job
from astrolabe_diffusers.serving.bounded_protocol import ConnectionLimits, make_server
from tests.rewards.http_server import serving
from tests.rewards.placed_rewards import Recorded, assert_own_scores, make_batch, make_job


PATH = "tests.rewards.placed_rewards"
FIRST, OBEYS, ENDS, BRIGHT = (f"{PATH}:{name}" for name in ("first_pixel", "obeys", "EndFrames", "Bright"))


def remote(url, *names, timeout=20.0):
    return RewardSet(dict.fromkeys(names, 1.0), placement=dict.fromkeys(names, url), timeout=timeout)


@pytest.fixture(scope="module")
def url():
    rewards = LocalRewards([FIRST, OBEYS, ENDS, BRIGHT, "sharpness"])
    with serving(create_app(rewards, max_request_bytes=2**20)) as url:
        yield url


def test_scores_are_those_of_this_process(url):
    names = [FIRST, ENDS, BRIGHT, "sharpness"]
    batch = make_batch([7, 200, 31], frames=5, size=16)
    away, here = remote(url, *names)(*batch), RewardSet(dict.fromkeys(names, 1.0))(*batch)
    torch.testing.assert_close(away.scores, here.scores)
    torch.testing.assert_close(away.info, here.info)
    assert list(away.scores) == names
    assert remote(url, *names).using_prompts == [FIRST, ENDS]


def test_places_work_together(url):
    batch = make_batch([7, 200], size=16)
    mixed = RewardSet({FIRST: 1.0, "flicker": 2.0, "sharpness": 3.0}, placement={FIRST: url, "flicker": "cpu"})
    here = RewardSet({FIRST: 1.0, "flicker": 2.0, "sharpness": 3.0})
    torch.testing.assert_close(mixed(*batch).total, here(*batch).total)


def test_clients_at_the_same_time_get_their_own_scores(url):
    numbers = [list(range(start, start + 1 + start % 3)) for start in range(0, 120, 4)]
    batches = [make_batch(n, act="wait 0.02") for n in numbers]
    clients = [remote(url, OBEYS) for _ in range(6)]
    before = requests.get(f"{url}/metrics").text
    with ThreadPoolExecutor(6) as executor:
        outputs = list(executor.map(lambda i: clients[i % 6](*batches[i]), range(len(batches))))
    for output, n in zip(outputs, numbers):
        assert_own_scores(output, OBEYS, n)
    batches = count(requests.get(f"{url}/metrics").text, "batches") - count(before, "batches")
    assert batches < len(numbers)  # several clients were scored together


def count(metrics, name):
    return int(metrics.split(f"\nastrolabe_reward_{name}_total ")[1].split()[0])


@pytest.mark.parametrize(
    ("act", "kind", "words"),
    [
        ("too_few", RewardError, r"status 422: .*\[2\], but has shape \[1\]"),
        ("nan", RewardError, "nan for sample 1, prompt 'video 2'"),
        ("refuse", ValueError, "400: it takes no such videos.$"),
        ("fail", RewardPlacementError, "500: a reward failed: ArithmeticError; the log of the server says more$"),
    ],
)
def test_faults_of_a_reward_are_one_error(url, act, kind, words, caplog):
    with pytest.raises(kind, match=words):
        remote(url, OBEYS)(*make_batch([1, 2], act=act))
    assert act != "fail" or ("too dark" in caplog.text and "Traceback" not in caplog.text)


def test_videos_that_a_reward_does_not_take(url):
    with pytest.raises(ValueError, match="400: it takes 50 frames, not 51.$"):
        remote(url, ENDS)(*make_batch([1], frames=51))


def test_a_reward_is_served_for_one_frame_rate(url):
    """Where that matters to it and nobody has said another, it is that of its default."""
    name, batch = "dynamic_degree", make_batch([1, 2], frames=9, size=64)
    told = LocalRewards([name], {name: {"fps": 24.0}})
    with serving(create_app(LocalRewards([name, "sharpness"]))) as assuming, serving(create_app(told)) as knowing:

        def scores(url, fps, names=(name,)):
            return RewardSet(dict.fromkeys(names, 1.0), placement=dict.fromkeys(names, url), fps=fps)(*batch).scores

        here = {fps: RewardSet({name: 1.0}, fps=fps)(*batch).scores[name] for fps in (16.0, 24.0)}
        torch.testing.assert_close(scores(assuming, 16.0)[name], here[16.0])
        torch.testing.assert_close(scores(knowing, 24.0)[name], here[24.0])
        scores(assuming, 24.0, ["sharpness"])
        with pytest.raises(ValueError, match="dynamic_degree as of 16 frames a second, and these videos have 24"):
            scores(assuming, 24.0)
    assert not torch.allclose(here[16.0], here[24.0])


def test_a_slow_server_is_one_error(url):
    with pytest.raises(RewardPlacementError, match="did not answer within 0.3 s"):
        remote(url, OBEYS, timeout=0.3)(*make_batch([1], act="wait 0.6"))
    assert_own_scores(remote(url, OBEYS)(*make_batch([2])), OBEYS, [2])


def empty_job(*shape):
    return pack_job(ScoringJob({OBEYS: torch.zeros(shape, dtype=torch.uint8)}, frozenset(), ["p"] * shape[0], None))


def test_requests_are_checked_before_they_are_scored(url):
    def post(data):
        answer = requests.post(f"{url}/score", data=data)
        return answer.status_code, answer.json()["error"]

    assert post(b"nonsense")[0] == 400
    status, error = post(pack_job(ScoringJob.make(torch.rand(1, 2, 3, 4, 4), {"another": None}, ["p"], None)))
    assert status == 400 and "no reward 'another'; there are" in error
    assert post(bytes(2**20 + 1)) == (413, "a request may have 1048576 bytes")
    assert post(iter([bytes(2**19)] * 3)) == (413, "a request may have 1048576 bytes")  # its length is not announced
    for job, words in (
        (save({"header": torch.tensor([91] * 200_000, dtype=torch.uint8)}), "nested too deeply"),  # [[[[...
        (empty_job(1, 0, 3, 4, 4), "none of them empty"),
        (empty_job(1, 2, 3, 0, 4), "none of them empty"),
        (empty_job(0, 2, 3, 4, 4), "none of them empty"),
    ):
        status, error = post(job)
        assert status == 400 and words in error
    assert requests.get(f"{url}/docs").status_code == 404


@pytest.mark.parametrize(
    "query",
    ["num_frames=many&height=4&width=4", "num_frames=0&height=-1&width=4", "num_frames=20000000&height=4&width=4",
     "num_frames=4&height=4&width=100000", "num_frames=4&height=4"],
)  # fmt: skip
def test_sizes_are_checked_before_any_work(url, query):
    answer = requests.get(f"{url}/requests?{query}")
    assert answer.status_code == 400
    assert answer.json() == {"error": "num_frames must be from 1 to 100000, height and width from 1 to 16384"}


def test_a_job_of_another_release_is_refused(url, monkeypatch):
    monkeypatch.setattr("astrolabe_diffusers.rewards.placement.wire.VERSION", 1)
    data = pack_job(make_job([1]))
    monkeypatch.undo()
    answer = requests.post(f"{url}/score", data=data)
    assert answer.status_code == 400 and "of version 1, not 3: both ends need the same release" in answer.text


def test_gray_and_colour_travel_as_they_are_asked():
    gray, ends = f"{PATH}:GrayEnds", ENDS
    batch = make_batch([7, 200, 31], frames=5, size=16)
    with serving(create_app(LocalRewards([gray, ends]))) as url:
        away, here = remote(url, gray, ends)(*batch), RewardSet({gray: 1.0, ends: 1.0})(*batch)
    torch.testing.assert_close(away.scores, here.scores)
    assert away.info[f"{gray}/C"].tolist() == [1.0] * 3 and away.info[f"{ends}/C"].tolist() == [3.0] * 3


def connect(url):
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=5)


def is_closed(connection):
    """Waits for the end of a connection, five seconds at most."""
    try:
        while connection.recv(2**16):
            pass
        return True
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True


HALF_HEADERS = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-"
HALF_BODY = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\nabc"
WHOLE = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize("sent", [b"", HALF_HEADERS, HALF_BODY, WHOLE + HALF_HEADERS], ids=str)
def test_a_request_has_to_be_complete_in_time(sent, caplog):
    limits = ConnectionLimits(seconds=0.3)
    with serving(create_app(LocalRewards(["sharpness"]), limits=limits), limits) as url:
        with connect(url) as slow:
            slow.sendall(sent)
            if sent.startswith(WHOLE):
                assert b"200 OK" in slow.recv(2**16)
            started = time.monotonic()
            assert is_closed(slow) and time.monotonic() - started < 4
        assert requests.get(f"{url}/health").status_code == 200
        assert "astrolabe_reward_waiting_bytes 0" in requests.get(f"{url}/metrics").text
    assert limits.refused == 1 and not caplog.text


def test_a_body_that_comes_at_a_fair_rate_has_its_time():
    limits = ConnectionLimits(seconds=0.2)
    with serving(create_app(LocalRewards(["sharpness"]), limits=limits), limits) as url, connect(url) as fair:
        fair.sendall(b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 800000\r\n\r\n")
        for _ in range(8):  # 0.8 s at 1 MB a second, four times the rate that is asked
            fair.sendall(bytes(100_000))
            time.sleep(0.1)
        assert b"400 Bad Request" in fair.recv(2**16)  # a whole request, which is no job


def test_who_does_not_take_an_answer_is_left():
    limits = ConnectionLimits(seconds=0.3)
    with serving(create_app(LocalRewards([ENDS, f"{PATH}:GrayEnds", f"{PATH}:Every"]), limits=limits), limits) as url:
        with connect(url) as idle:
            idle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            ask = b"GET /requests?num_frames=100000&height=4&width=4 HTTP/1.1\r\nHost: localhost\r\n\r\n"
            idle.sendall(ask * 20)
            deadline = time.monotonic() + 30
            while not limits.refused and time.monotonic() < deadline:
                time.sleep(0.05)
        assert limits.refused == 1
        assert requests.get(f"{url}/health").status_code == 200


def test_half_open_connections_cannot_take_the_server_down(caplog):
    limits = ConnectionLimits(connections=20, seconds=60)
    with serving(create_app(LocalRewards(["sharpness"]), limits=limits), limits) as url:
        crowd = [connect(url) for _ in range(50)]
        for client in crowd:
            with suppress(OSError):
                client.sendall(HALF_HEADERS)
        # They are closed for their number: the others have a minute.
        assert all(is_closed(client) for client in crowd[20:])
        assert limits.refused == 30
        for client in crowd:
            client.close()
        deadline = time.monotonic() + 20
        while True:
            try:
                assert requests.get(f"{url}/health").status_code == 200
                break
            except requests.ConnectionError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
    assert not caplog.text


def test_what_is_no_http_and_clients_that_go_leave_no_log(caplog, capfd):
    limits = ConnectionLimits()
    with serving(create_app(LocalRewards(["sharpness"]), limits=limits), limits) as url:
        for sent in (b"\x16\x03\x01 hello\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"a" * 20_000, HALF_BODY):
            with connect(url) as client:
                client.sendall(sent)
                if sent is not HALF_BODY:
                    assert b"400" in client.recv(2**16)
        text = requests.get(f"{url}/metrics").text
        assert "astrolabe_reward_refused_connections_total 2" in text
    assert not caplog.text and not capfd.readouterr().err


def test_requests_are_held_up_to_a_number_of_bytes():
    rewards = Recorded()
    data = pack_job(make_job([1], size=64))
    app = create_app(rewards, max_request_bytes=2**20, max_waiting_bytes=4 * len(data))
    with serving(app) as url, ThreadPoolExecutor(2) as executor:

        def post(job):
            return requests.post(f"{url}/score", data=job, headers={"X-Request-Id": "1"}, timeout=20).status_code

        two = [executor.submit(post, data) for _ in range(2)]
        assert rewards.started.wait(20)
        deadline = time.monotonic() + 10
        while f"astrolabe_reward_waiting_bytes {4 * len(data)}" not in requests.get(f"{url}/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert post(data) == 503
        assert post(iter([data])) == 503  # its length is not announced
        rewards.go.set()
        assert [future.result(20) for future in two] == [200, 200]
        assert post(data) == 200


def test_bytes_that_are_announced_are_held_before_they_come():
    app = create_app(LocalRewards(["sharpness"]), max_waiting_bytes=3_500_000)
    with serving(app) as url, connect(url) as first:
        first.sendall(HALF_BODY.removesuffix(b"abc"))
        deadline = time.monotonic() + 10
        while "astrolabe_reward_waiting_bytes 2000000" not in requests.get(f"{url}/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with connect(url) as second:
            second.sendall(HALF_BODY.removesuffix(b"abc"))
            assert b"503 Service Unavailable" in second.recv(2**16)


def test_a_server_needs_no_more_open_files_than_it_may_have():
    with pytest.raises(ValueError, match="100000000 connections need 100000256 open files, and this process"):
        make_server(create_app(LocalRewards(["sharpness"])), ConnectionLimits(connections=100_000_000))


def test_a_page_of_elsewhere_whose_name_means_this_machine():
    """Its browser asks for whatever the page says, and the name is all that tells."""
    app = create_app(LocalRewards(["sharpness"]))
    with serving(app) as url:
        port = url.rpartition(":")[2]
        names = {"evil.example": 403, f"evil.example:{port}": 403, "localhost": 200, "[::1]:1": 200}
        for host, status in names.items():
            answer = requests.get(f"{url}/rewards", headers={"Host": host})
            assert answer.status_code == status, host
        answer = requests.get(f"{url}/health", headers={"Host": "evil.example"})
        assert "names of its machine" in answer.json()["error"]
    with serving(create_app(LocalRewards(["sharpness"]), token="secret")) as url:
        headers = {"Host": "rewards.example", "Authorization": "Bearer secret"}
        assert requests.get(f"{url}/rewards", headers=headers).status_code == 200


def test_a_token_is_asked_for(monkeypatch):
    with serving(create_app(LocalRewards(["sharpness"]), token="secret")) as url:
        assert requests.get(f"{url}/health").json() == {"status": "ok"}
        for path in ("/rewards", "/metrics", "/requests"):
            assert requests.get(url + path).status_code == 401
        assert requests.post(f"{url}/score", headers={"Authorization": "Bearer wrong"}).status_code == 401
        with pytest.raises(RewardPlacementError, match="status 401: it wants its token in ASTROLABE_REWARD_TOKEN"):
            remote(url, "sharpness")
        monkeypatch.setenv("ASTROLABE_REWARD_TOKEN", "secret")
        assert len(remote(url, "sharpness")(*make_batch([1, 2])).total) == 2
