"""What each of two processes does for test_agreement.py; started by torchrun."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from accelerate import Accelerator

from astrolabe_diffusers.distributed.agreement import leave_if_called_off, raise_together
from astrolabe_diffusers.errors import Interrupted, UserError


def attempt(rank: int, errors: dict[int, Exception]) -> tuple[str, str]:
    """Type and message of what comes out of a block in which processes fail; the others work for a minute."""
    try:
        with raise_together():
            if rank in errors:
                raise errors[rank]
            for _ in range(600):
                leave_if_called_off()
                time.sleep(0.1)
    except Exception as error:
        return type(error).__name__, str(error)
    return "none", ""


def main(folder: Path):
    accelerator = Accelerator()
    assert accelerator.num_processes == 2
    with raise_together():
        results = []
    start = time.monotonic()
    results += [
        attempt(accelerator.process_index, errors)
        for errors in (
            {1: UserError("a mistake")},
            {0: ZeroDivisionError("a bug")},
            {1: Interrupted(15)},
            {0: Interrupted(15), 1: UserError("goes before a signal")},
        )
    ]
    seconds = time.monotonic() - start
    (folder / str(accelerator.process_index)).write_text(repr((results, seconds)))
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
