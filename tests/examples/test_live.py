"""examples/live.py and examples/app.py: the settings that come of them."""

import runpy
import sys
from pathlib import Path

import pytest

from astrolabe_diffusers import TINY_SHAPES


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("script", "arguments", "wanted"),
    [
        ("live.py", [], {"host": "127.0.0.1", "port": 7860, "public": False, "sessions": 1}),
        ("live.py", ["--model", "tiny_shapes", "--port", "9000"], {"port": 9000}),
        ("app.py", [], {"host": "0.0.0.0", "port": 7860, "public": True, "sessions": 2}),
    ],
)
def test_settings(monkeypatch, script, arguments, wanted):
    configs = []
    monkeypatch.setattr("astrolabe_diffusers.cli.live.serve", configs.append)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    assert end.value.code == 0
    assert {name: getattr(configs[0], name) for name in wanted} == wanted and configs[0].model == TINY_SHAPES
