"""The server of rewards, over real connections."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
import torch

from astrolabe_diffusers.rewards import RewardError, RewardPlaceError, RewardSet
from astrolabe_diffusers.rewards.cached_rewards import CachedRewards
from astrolabe_diffusers.rewards.local_rewards import LocalRewards
from astrolabe_diffusers.rewards.server import Batcher, check_binding, create_app
from astrolabe_diffusers.rewards.wire import Job, pack_job
from tests.rewards.http_server import serving
from tests.rewards.placed_rewards import assert_own_scores, make_batch


PATH = "tests.rewards.placed_rewards"
FIRST, OBEYS, ENDS, BRIGHT = (f"{PATH}:{name}" for name in ("first_pixel", "obeys", "EndFrames", "Bright"))


def remote(url, *names, timeout=20.0):
    return RewardSet(dict.fromkeys(names, 1.0), placement=dict.fromkeys(names, url), timeout=timeout)


@pytest.fixture(scope="module")
def url():
    rewards = CachedRewards([FIRST, OBEYS, ENDS, BRIGHT, "sharpness"], cache_size=100)
    with serving(create_app(rewards, max_request_bytes=2**20)) as url:
        yield url


def test_scores_are_those_of_this_process(url):
    names = [FIRST, ENDS, BRIGHT, "sharpness"]
    batch = make_batch([7, 200, 31], frames=5, size=16)
    for _ in range(2):  # the second time some come from the cache
        away, here = remote(url, *names)(*batch), RewardSet(dict.fromkeys(names, 1.0))(*batch)
        torch.testing.assert_close(away.scores, here.scores)
        torch.testing.assert_close(away.info, here.info)
        assert list(away.scores) == names
    assert remote(url, *names).using_prompts == [FIRST, ENDS]
    assert "astrolabe_reward_cache_hits_total 3" in requests.get(f"{url}/metrics").text


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


def make_job(numbers, act="", size=4):
    videos, prompts, metadata = make_batch(numbers, size=size, act=act)
    return Job.make(videos, {OBEYS: None}, prompts, metadata)


class Recorded(LocalRewards):
    """Notes the prompts that are scored together, and waits for `go` before the first."""

    def __init__(self):
        super().__init__([OBEYS])
        self.batches, self.go, self.started = [], threading.Event(), threading.Event()

    def score_job(self, job):
        self.started.set()
        assert self.go.wait(20)
        self.batches.append([int(prompt.split()[-1]) for prompt in job.prompts])
        return super().score_job(job)


def test_what_waits_is_scored_together_if_it_fits():
    rewards = Recorded()
    batcher = Batcher(rewards, max_batch=4, max_waiting=10)
    jobs = [[1], [2, 3], [4, 5], [6, 7, 8], [9]]
    futures = [batcher.submit(make_job(jobs[0]))]
    assert rewards.started.wait(20)
    futures += [batcher.submit(make_job(numbers)) for numbers in jobs[1:]]
    futures.append(batcher.submit(make_job([10], size=6)))
    rewards.go.set()
    for numbers, future in zip([*jobs, [10]], futures):
        assert future.result(20)[OBEYS].info["prompt"].tolist() == numbers
    assert rewards.batches == [[1], [2, 3, 4, 5], [6, 7, 8, 9], [10]]


def test_a_client_does_not_suffer_from_the_videos_of_another():
    rewards = Recorded()
    batcher = Batcher(rewards, max_batch=8, max_waiting=10)
    first = batcher.submit(make_job([0]))
    assert rewards.started.wait(20)
    futures = [batcher.submit(make_job([i], act=act)) for i, act in enumerate(["too_few", "", "fail"])]
    gone = batcher.submit(make_job([5]))
    gone.cancel()
    rewards.go.set()
    with pytest.raises(RewardError, match="but has shape"):
        futures[0].result(20)
    assert futures[1].result(20)[OBEYS].info["prompt"].tolist() == [1.0]
    with pytest.raises(ArithmeticError):
        futures[2].result(20)
    assert first.result(20) and [5] not in rewards.batches and [0, 1, 2] in rewards.batches


def test_a_full_queue_is_busy():
    rewards = Recorded()
    batcher = Batcher(rewards, max_batch=1, max_waiting=2)
    batcher.submit(make_job([1]))
    assert rewards.started.wait(20)
    assert batcher.submit(make_job([2])) and batcher.submit(make_job([3]))
    assert batcher.submit(make_job([4])) is None
    rewards.go.set()


@pytest.mark.parametrize(
    ("act", "kind", "words"),
    [
        ("too_few", RewardError, r"status 422: .*\[2\], but has shape \[1\]"),
        ("nan", RewardError, "nan for sample 1, prompt 'video 2'"),
        ("fail", RewardPlaceError, "status 500: a reward failed: ArithmeticError: too dark"),
    ],
)
def test_faults_of_a_reward_are_one_error(url, act, kind, words):
    with pytest.raises(kind, match=words):
        remote(url, OBEYS)(*make_batch([1, 2], act=act))


def test_a_slow_server_is_one_error(url):
    with pytest.raises(RewardPlaceError, match="did not answer within 0.5 s"):
        remote(url, OBEYS, timeout=0.5)(*make_batch([1], act="wait 1.5"))
    assert_own_scores(remote(url, OBEYS)(*make_batch([2])), OBEYS, [2])


def test_requests_are_checked_before_they_are_scored(url):
    def post(data):
        answer = requests.post(f"{url}/score", data=data)
        return answer.status_code, answer.json()["error"]

    assert post(b"nonsense")[0] == 400
    status, error = post(pack_job(Job.make(torch.rand(1, 2, 3, 4, 4), {"another": None}, ["p"], None)))
    assert status == 400 and "no reward 'another'; there are" in error
    assert post(bytes(2**20 + 1)) == (413, "a request may have 1048576 bytes")
    assert post(iter([bytes(2**19)] * 3)) == (413, "a request may have 1048576 bytes")  # its length is not announced
    assert requests.get(f"{url}/requests?num_frames=many").status_code == 422
    assert requests.get(f"{url}/docs").status_code == 404


def test_a_token_is_asked_for(monkeypatch):
    with serving(create_app(LocalRewards(["sharpness"]), token="secret")) as url:
        assert requests.get(f"{url}/health").json() == {"status": "ok"}
        for path in ("/rewards", "/metrics", "/requests"):
            assert requests.get(url + path).status_code == 401
        assert requests.post(f"{url}/score", headers={"Authorization": "Bearer wrong"}).status_code == 401
        with pytest.raises(RewardPlaceError, match="status 401: it wants its token in ASTROLABE_REWARD_TOKEN"):
            remote(url, "sharpness")
        monkeypatch.setenv("ASTROLABE_REWARD_TOKEN", "secret")
        assert len(remote(url, "sharpness")(*make_batch([1, 2])).total) == 2


def test_only_this_machine_is_served_without_a_token():
    for host in ("127.0.0.1", "::1", "localhost", "127.1.2.3"):
        check_binding(host, None)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        with pytest.raises(ValueError, match=f"{host} can be reached from elsewhere"):
            check_binding(host, None)
        check_binding(host, "secret")
