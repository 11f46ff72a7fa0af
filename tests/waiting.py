"""For what comes about in another thread or process."""

from __future__ import annotations

import time


def wait_for(condition, seconds: float = 20.0):
    """What `condition` returns once that is true."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)
    return result
