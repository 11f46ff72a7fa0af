"""The client of a server of rewards, and what servers can do wrong."""

import json
import os
import threading
import time

import pytest

from astrolabe_diffusers.rewards import RewardError, RewardPlacementError, RewardSet
from astrolabe_diffusers.rewards.placement.remote import RemoteRewards
from astrolabe_diffusers.rewards.placement.wire import VERSION
from tests.rewards.http_server import answering
from tests.rewards.placed_rewards import make_batch


KNOWN = {"rewards": ["quality"], "using_prompts": [], "max_request_bytes": 10_000, "version": VERSION}


def score(reply, timeout=2.0, batch=2):
    """What a set gives for a batch when the server answers `reply(headers) -> (status, body)` to /score."""

    def answer(path, headers, body):
        if path == "/rewards":
            text = KNOWN
        elif path.startswith("/requests"):
            text = {"quality": None}
        else:
            return reply(headers)
        return 200, json.dumps(text).encode()

    with answering(answer) as url:
        return RewardSet({"quality": 1.0}, placement={"quality": url}, timeout=timeout)(*make_batch(range(batch)))


def right(headers, scores=(0.25, 0.75)):
    outputs = {"quality": {"scores": list(scores), "info": {}}}
    return 200, json.dumps({"request": headers["X-Request-Id"], "outputs": outputs}).encode()


def test_the_answer_of_a_server_is_the_score():
    assert score(right).scores["quality"].tolist() == [0.25, 0.75]


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (lambda headers: (200, b"<html>hello</html>"), "nonsense, with status 200: it is no JSON"),
        (lambda headers: (200, b"[" * 200_000), "nonsense, with status 200: it is no JSON"),
        (lambda headers: (200, b"\xff\xfe\x00"), "nonsense"),
        (lambda headers: (200, b"[]"), "nonsense"),
        (lambda headers: (200, b'{"outputs": {}}'), "nonsense"),
        (lambda headers: right({"X-Request-Id": "another"}), "answer to another request"),
        (lambda headers: right(headers, [0.5]), "1 numbers in 'scores' for 2 videos"),
        (lambda headers: right(headers, [0.5, 0.5, 0.5]), "3 numbers in 'scores' for 2 videos"),
        (lambda headers: right(headers, [0.5, "high"]), "no numbers for 'quality'"),
        (lambda headers: (500, b'{"error": "a reward failed: out of memory"}'), "status 500: a reward failed: out of"),
        (lambda headers: (401, b'{"error": "no token"}'), "ASTROLABE_REWARD_TOKEN"),
        (lambda headers: (302, b"{}"), "status 302"),
    ],
)
def test_anything_else_is_one_error(reply, words):
    with pytest.raises(RewardPlacementError, match=words) as error:
        score(reply)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_scores_that_are_no_numbers_are_errors_of_the_reward(bad):
    with pytest.raises(RewardError, match=f"gave {bad} for sample 1, prompt 'video 1'"):
        score(lambda headers: right(headers, [0.5, bad]))


def test_what_a_reward_refuses_is_its_error():
    with pytest.raises(RewardError, match="gave no score"):
        score(lambda headers: (422, b'{"error": "it gave no score"}'))


def test_a_server_that_hangs_is_an_error():
    started, end = time.monotonic(), threading.Event()
    with pytest.raises(RewardPlacementError, match="did not answer within 0.2 s"):
        score(lambda headers: end.wait(20), timeout=0.2)
    assert time.monotonic() - started < 4
    end.set()


def test_a_busy_server_is_asked_again(monkeypatch):
    monkeypatch.setattr("astrolabe_diffusers.rewards.placement.remote._PAUSE_SECONDS", 0.05)
    answers = iter([(503, b'{"error": "busy"}')] * 2)
    assert score(lambda headers: next(answers, None) or right(headers)).scores["quality"].tolist() == [0.25, 0.75]
    with pytest.raises(RewardPlacementError, match="is busy"):
        score(lambda headers: (503, b"{}"), timeout=0.3)


@pytest.mark.parametrize("timeout, away", [(0.5, 45), (600, 0.5)])
def test_a_server_that_goes_away_is_waited_for_and_then_an_error(monkeypatch, timeout, away):
    monkeypatch.setattr("astrolabe_diffusers.rewards.placement.remote._PAUSE_SECONDS", 0.05)
    monkeypatch.setattr("astrolabe_diffusers.rewards.placement.remote._AWAY_SECONDS", away)
    with answering(lambda *request: (200, json.dumps(KNOWN).encode())) as url:
        client = RemoteRewards(url, ["quality"], timeout=timeout)
    started = time.monotonic()
    with pytest.raises(RewardPlacementError, match=r"cannot be reached \(ConnectionError\)"):
        client.score(*make_batch([1]))
    assert 0.3 < time.monotonic() - started < 10


def test_a_request_that_is_too_large_is_not_sent():
    words = r"100 videos are 0\.0\d+ MB, .* takes 0.00954 MB a request: make batches smaller, or its --max_request_mb"
    with pytest.raises(RewardPlacementError, match=words):
        score(lambda headers: pytest.fail("it was sent"), batch=100)


def test_wrong_addresses_are_found_at_once():
    started = time.monotonic()
    with pytest.raises(RewardPlacementError, match="http://127.0.0.1:9 cannot be reached"):
        RewardSet({"sharpness": 1.0}, placement={"sharpness": "http://127.0.0.1:9"})
    assert time.monotonic() - started < 5
    for answer in ({"hello": "world"}, {**KNOWN, "rewards": 3}, []):
        with answering(lambda *request: (200, json.dumps(answer).encode())) as url:
            with pytest.raises(RewardPlacementError, match="is no server of rewards"):
                RemoteRewards(url, ["sharpness"])
    for version in (None, 1, 2):
        known = {**KNOWN, "version": version} if version else {k: v for k, v in KNOWN.items() if k != "version"}
        with answering(lambda *request: (200, json.dumps(known).encode())) as url:
            with pytest.raises(RewardPlacementError, match=r"speaks version \d of the .* same release") as error:
                RemoteRewards(url, ["quality"])
        assert "\n" not in str(error.value)
    with answering(lambda *request: (200, b'{"hello": "world"}')) as url:
        with pytest.raises(RewardPlacementError, match="is no server of rewards"):
            RemoteRewards(url, ["sharpness"])
    with answering(
        lambda *request: (200, json.dumps(KNOWN | {"rewards": ["a", "b"]}).encode())
    ) as url:
        with pytest.raises(ValueError, match="has no reward 'sharpness'; it has a, b"):
            RemoteRewards(url, ["a", "sharpness"])
        with pytest.raises(ValueError, match="options of 'a' are set where it is served"):
            RewardSet({"a": 1.0}, {"a": {"x": 1}}, {"a": url})


def test_neither_proxies_nor_other_secrets_are_used(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("ASTROLABE_REWARD_TOKEN", "secret")
    seen = []
    score(lambda headers: seen.append(headers["Authorization"]) or right(headers))
    assert seen == ["Bearer secret"] and "secret" in os.environ["ASTROLABE_REWARD_TOKEN"]
