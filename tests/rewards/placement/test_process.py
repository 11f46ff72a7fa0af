"""One process serves most of these tests, in their order: to start one takes seconds."""

import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from astrolabe_diffusers.rewards import RewardError, RewardPlacementError, RewardSet
from astrolabe_diffusers.rewards.placement import process as process_module
from astrolabe_diffusers.rewards.placement.process import ProcessRewards
from tests.rewards.placed_rewards import assert_own_scores, make_batch
from tests.waiting import wait_for


PATH = "tests.rewards.placed_rewards"
FIRST, OBEYS, ENDS = f"{PATH}:first_pixel", f"{PATH}:obeys", f"{PATH}:EndFrames"
NAMES = {FIRST: 1.0, OBEYS: 1.0, ENDS: 1.0, "sharpness": 0.5}
OPTIONS = {FIRST: {"scale": 2.0}}


@pytest.fixture(scope="module")
def rewards():
    rewards = RewardSet(NAMES, OPTIONS, dict.fromkeys(NAMES, "process"), timeout=60)
    yield rewards
    process = rewards._away[0]._process
    rewards.close()
    assert not process.is_alive()


@pytest.fixture
def worker(rewards):
    return rewards._away[0]


def test_scores_are_those_of_this_process_from_another_one(rewards):
    batch = make_batch([7, 200, 31], frames=5, size=16)
    away, here = rewards(*batch), RewardSet(NAMES, OPTIONS)(*batch)
    torch.testing.assert_close(away.scores, here.scores)
    torch.testing.assert_close(away.total, here.total)
    assert away.info[f"{FIRST}/process"].unique().item() != os.getpid()
    assert not away.total.is_inference() and away.info[f"{ENDS}/F"].tolist() == [2.0] * 3


def test_it_is_known_which_look_at_the_prompt(rewards):
    assert rewards.using_prompts == [FIRST, OBEYS, ENDS]


def test_errors_of_a_reward_come_back_and_the_process_goes_on(rewards, worker):
    process = worker._process.pid
    with pytest.raises(RuntimeError, match=r"ArithmeticError: too dark \(.*placed_rewards.py:\d+\)"):
        rewards(*make_batch([3], act="fail"))
    with pytest.raises(RuntimeError, match=r"SystemExit: 3 \(.*placed_rewards.py:\d+\)"):
        rewards(*make_batch([3], act="exit"))
    with pytest.raises(RewardError, match=r"\[2\], but has shape \[1\]"):
        rewards(*make_batch([1, 2], act="too_few"))
    with pytest.raises(ValueError, match="^it takes no such videos.$"):
        rewards(*make_batch([3], act="refuse"))
    with pytest.raises(ValueError, match="^it takes 50 frames, not 51.$"):
        rewards(*make_batch([3], frames=51))
    with pytest.raises(RewardError, match="nan for sample 1, prompt 'video 2'"):
        rewards(*make_batch([1, 2], act="nan"))
    assert_own_scores(rewards(*make_batch([200])), OBEYS, [200])
    assert worker._process.pid == process


def test_a_process_that_is_killed_is_started_anew_and_asked_again(rewards, tmp_path, caplog):
    output = rewards(*make_batch([3, 5], act=f"die_once {tmp_path / 'died'}"))
    assert_own_scores(output, OBEYS, [3, 5])
    assert (tmp_path / "died").exists() and "SIGKILL" in caplog.text and "started anew" in caplog.text


def test_a_reward_that_hangs_is_ended(rewards, worker, monkeypatch):
    monkeypatch.setattr(worker, "timeout", 1.0)
    with pytest.raises(RewardPlacementError, match="sharpness did not answer within 1 s"):
        rewards(*make_batch([1], act="hang"))
    worker._process.join(10)
    assert worker._process.exitcode == -signal.SIGKILL


def test_a_process_that_died_between_batches_is_started_anew(rewards, worker):
    dead = worker._process.pid
    assert_own_scores(rewards(*make_batch([9, 8])), OBEYS, [9, 8])
    assert worker._process.pid != dead


def test_a_process_that_dies_twice_is_one_error(rewards):
    started = time.monotonic()
    with pytest.raises(RewardPlacementError, match="sharpness ended twice over the same videos by SIGKILL") as error:
        rewards(*make_batch([1], act="die"))
    assert time.monotonic() - started < 60 and "\n" not in str(error.value)


def test_a_large_batch_does_not_fill_the_pipe_of_a_process_that_hangs(rewards, worker, monkeypatch):
    """What is sent is more than a pipe holds: without the limit, sending would wait for ever."""
    rewards(*make_batch([1], size=512))
    os.kill(worker._process.pid, signal.SIGSTOP)
    monkeypatch.setattr(worker, "timeout", 1.0)
    with pytest.raises(RewardPlacementError, match="did not answer within 1 s"):
        rewards(*make_batch([1], size=512))


def test_a_process_that_is_ended_in_the_midst_of_an_answer_is_not_started_anew(rewards, worker, monkeypatch):
    """A run that fails does not wait for rewards that another thread has asked."""
    monkeypatch.setattr(process_module, "END_SECONDS", 0.2)
    rewards(*make_batch([1]))
    started = time.monotonic()
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(rewards, *make_batch([1], act="hang"))
        while not answer.running():
            time.sleep(0.01)
        time.sleep(0.2)
        process = worker._process
        rewards.close()
        with pytest.raises(RewardPlacementError, match="sharpness was ended"):
            answer.result()
    assert worker._process is process and not process.is_alive() and time.monotonic() - started < 30


def test_it_is_not_started_anew_if_it_is_ended_meanwhile(monkeypatch):
    """One moment is that between its death and its restart."""
    with ProcessRewards({FIRST: FIRST}) as rewards:
        monkeypatch.setattr(rewards, "_exit_code", lambda: rewards.close() or "")
        os.kill(rewards._process.pid, signal.SIGKILL)
        with pytest.raises(RewardPlacementError, match="first_pixel was ended"):
            rewards.score(*make_batch([1]))
    assert not multiprocessing.active_children()


def test_it_can_be_ended_while_it_loads_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(process_module, "END_SECONDS", 0.2)
    name, file = f"{PATH}:LoadsOnce", tmp_path / "loaded"
    with ProcessRewards({name: name}, options={name: {"file": str(file)}}) as rewards, ThreadPoolExecutor(1) as thread:
        os.kill(rewards._process.pid, signal.SIGKILL)
        answer = thread.submit(rewards.score, *make_batch([1]))
        wait_for(file.read_text, 60)
        rewards.close()
        with pytest.raises(RewardPlacementError, match="LoadsOnce was ended"):
            answer.result(20)
    assert not multiprocessing.active_children()


def score_and_be_killed(connection, method):
    process_module.START_METHOD = method
    rewards = ProcessRewards({FIRST: FIRST}, options=OPTIONS)
    output = rewards.score(*make_batch([7, 200]))[FIRST]
    process = rewards._process
    connection.send((process.pid, type(process).__name__, output.scores.tolist(), output.info["process"].tolist()))
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("method", ["spawn", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_a_trainer_that_is_killed_leaves_no_process(method):
    """With `spawn` too, which is all that some systems have."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    trainer = context.Process(target=score_and_be_killed, args=(theirs, method))
    trainer.start()
    number, kind, scores, processes = ours.recv()
    trainer.join()
    assert kind.lower() == f"{method}process" and processes == [number, number]
    assert scores == pytest.approx([14 / 255, 400 / 255])

    def is_gone():
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return True

    wait_for(is_gone, 60)


class Asked(Exception):
    """For a process."""


@pytest.mark.parametrize("has_gpu,method", [(False, process_module.START_METHOD), (True, "spawn")])
def test_what_has_a_gpu_is_never_forked(monkeypatch, has_gpu, method):
    """CUDA does not survive it, and whoever started the server that forks may have asked for it."""

    def executor(number, context, *arguments):
        raise Asked(context.get_start_method())

    monkeypatch.setattr(process_module, "ProcessPoolExecutor", executor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(Asked, match=f"^{method}$"):
        ProcessRewards({FIRST: FIRST})


@pytest.mark.gpu
def test_a_process_has_a_gpu_of_its_own_context():
    torch.zeros(1, device="cuda")
    name = f"{PATH}:Learned"
    with ProcessRewards({name: name, FIRST: FIRST}, device="cuda:0") as rewards:
        outputs = rewards.score(*make_batch([7]))
    assert outputs[name].scores.tolist() == [0.0]  # its weights are not on the CPU
    torch.testing.assert_close(outputs[FIRST].scores, torch.tensor([7 / 255]))


def test_of_several_places_the_first_ends_if_another_cannot_be():
    with pytest.raises(ValueError, match="has no option 'size'"):
        RewardSet({FIRST: 1.0, OBEYS: 1.0}, {OBEYS: {"size": 1}}, {FIRST: "process", OBEYS: "cpu"})
    assert not multiprocessing.active_children()


def test_mistakes_are_found_when_the_process_starts():
    with pytest.raises(ValueError, match="has no option 'size'; it has scale"):
        RewardSet({FIRST: 1.0}, {FIRST: {"size": 1}}, {FIRST: "process"})


def test_of_several_places_each_process_of_a_run_takes_one():
    batch = make_batch([7], frames=1, size=16)
    for index, own in ((0, True), (1, False), (2, True)):
        with RewardSet({FIRST: 1.0}, placement={FIRST: "trainer|process"}, process_index=index) as rewards:
            assert (rewards(*batch).info[f"{FIRST}/process"].item() == os.getpid()) == own
    with pytest.raises(ValueError, match="there is no place 'nowhere'"):
        RewardSet({FIRST: 1.0}, placement={FIRST: "trainer|nowhere"})
