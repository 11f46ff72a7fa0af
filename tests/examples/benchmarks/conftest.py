import sys
from pathlib import Path

import pytest


FOLDER = Path(__file__).parents[3] / "examples" / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    """As for a script, which finds what lies beside it."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in (path.stem for path in FOLDER.glob("*.py")):
        sys.modules.pop(name, None)
