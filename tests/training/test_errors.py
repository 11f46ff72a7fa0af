import pytest

from astrolabe_diffusers.training.errors import UserError, exit_code


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
