import subprocess
import sys
import threading
import time

import pytest

from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.rollout.reward_thread import RewardThread


def test_calls_run_in_order_in_another_thread():
    thread = RewardThread(timeout=20)
    here = threading.get_ident()
    futures = [thread.submit(lambda i=i: (i, threading.get_ident() == here)) for i in range(5)]
    assert [future.result() for future in futures] == [(i, False) for i in range(5)]
    thread.close()


def test_an_error_belongs_to_its_call():
    thread = RewardThread(timeout=20)
    with pytest.raises(ZeroDivisionError):
        thread.submit(lambda: 1 / 0).result()
    with pytest.raises(UserError, match=r"ended with SystemExit\(3\)"):
        thread.submit(sys.exit, 3).result()
    assert thread.submit(lambda: 1).result() == 1
    thread.close()


def test_a_call_that_hangs_is_given_up_and_its_result_comes_too_late():
    thread, release = RewardThread(timeout=0.1), threading.Event()
    future = thread.submit(release.wait)
    with pytest.raises(UserError, match="has not answered for 0.1 s"):
        future.result()
    release.set()
    assert thread.submit(lambda: 1).result() == 1
    assert isinstance(future.exception(), UserError)
    thread.close()


def test_a_closed_thread_takes_no_call():
    """Nobody would run it, and who asks would wait for ever."""
    thread = RewardThread(timeout=20)
    last = thread.submit(lambda: 1)
    thread.close()
    thread.close()
    assert last.result() == 1
    with pytest.raises(UserError, match="the rewards are closed"):
        thread.submit(lambda: 2)


def test_a_call_that_hangs_does_not_keep_the_process():
    code = (
        "import sys, threading\n"
        "from astrolabe_diffusers.rollout import reward_thread\n"
        "reward_thread.PATIENCE = 0.5\n"
        "reward_thread.RewardThread(100).submit(threading.Event().wait)\n"
        "sys.exit(2)\n"
    )
    begin = time.monotonic()
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 2
    assert time.monotonic() - begin < 50
