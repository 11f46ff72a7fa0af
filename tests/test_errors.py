import pytest
import torch

from astrolabe_diffusers.errors import UserError, exit_code


def fail(error):
    raise error


def test_exit_code(capsys):
    assert exit_code(lambda: {"any": "result"}) == 0
    assert exit_code(lambda: fail(UserError("name a reward."))) == 2
    assert capsys.readouterr().err == "error: name a reward.\n"
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: fail(ZeroDivisionError()))


def test_only_the_first_process_speaks(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert exit_code(lambda: fail(UserError("name a reward."))) == 2
    assert capsys.readouterr().err == ""
    for first in ("0", "y"):  # the second is a slip, which accelerate refuses in words
        monkeypatch.setenv("LOCAL_RANK", first)
        assert exit_code(lambda: fail(UserError("name a reward."))) == 2
        assert capsys.readouterr().err == "error: name a reward.\n"


def test_a_size_that_no_memory_holds_is_one_line(capsys):
    def allocate():
        return torch.empty(2**50)

    with pytest.raises(RuntimeError, match="can't allocate memory"):
        allocate()
    assert exit_code(allocate) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory, make videos, batches or the LoRA smaller")
    assert error.count("\n") == 1 and __file__ not in error
    assert exit_code(lambda: fail(MemoryError("no room"))) == 2
    assert capsys.readouterr().err.endswith("the LoRA smaller: MemoryError: no room\n")
    with pytest.raises(RuntimeError, match="shapes"):  # a bug keeps its traceback
        exit_code(lambda: torch.ones(2) @ torch.ones(3, 3))
