import ast

import pytest

from astrolabe_diffusers.distributed.agreement import raise_together
from astrolabe_diffusers.errors import UserError
from tests.processes import Torchrun


def test_error_of_one_process_is_raised_in_both_and_soon(tmp_path):
    code, output = Torchrun("tests/training/agreement_worker.py", tmp_path).finish()
    assert code == 0, output
    (first, first_seconds), (second, second_seconds) = (ast.literal_eval((tmp_path / r).read_text()) for r in "01")
    assert first[0] == second[0] == ("UserError", "a mistake")
    assert first[1] == ("ZeroDivisionError", "a bug")  # with its own traceback
    assert second[1][0] == "ProcessError" and "process 0 failed: ZeroDivisionError: a bug" in second[1][1]
    assert first[2] == second[2] == ("Interrupted", "SIGTERM")
    assert first[3] == second[3] == ("UserError", "goes before a signal")
    assert max(first_seconds, second_seconds) < 20


def test_one_process_raises_its_own_error():
    with raise_together():
        pass
    with pytest.raises(UserError, match="a mistake"), raise_together():
        raise UserError("a mistake")
