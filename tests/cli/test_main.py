"""`astrolabe COMMAND`, and what its help and its errors cost."""

import subprocess
import sys

import pytest

from astrolabe_diffusers import __version__
from astrolabe_diffusers.cli.main import COMMANDS, main


# The time that Python itself takes to start is not ours.
CODE = """
import sys, time
start = time.perf_counter()
from astrolabe_diffusers.cli.main import main
try:
    code = main({arguments!r})
except SystemExit as end:
    code = end.code
print("\\nresult:", code, time.perf_counter() - start, "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        *(([command, "--help"], 0) for command in COMMANDS),
        (["--help"], 0),
        (["train", "--algorithm", "awm", "--help"], 0),
        (["train", "--config", "list"], 0),
        (["train", "--config", "longlive_video_hpsv3", "--rnk", "4"], 2),
        (["train", "--rank", "0"], 2),
        (["train", "--algorithm", "ntf"], 2),
        (["generate", "--prompt", "a", "--sigmas", "1000", "500"], 2),
        (["evaluate", "--lora", "a/run,b/run"], 2),
        (["score", "video.mp4", "--reward", "sharpness=high"], 2),
        (["serve", "--port", "0"], 2),
        (["live", "--port", "0"], 2),
        (["generate", "--session", "a.json", "--seed", "3"], 2),
        (["convert", "--recipe", "self-forcin"], 2),
    ],
)
def test_help_and_wrong_arguments_load_no_torch(arguments, expected):
    # The best of three: other work on the machine counts for nothing.
    for _ in range(3):
        process = subprocess.run(
            [sys.executable, "-c", CODE.format(arguments=arguments)], capture_output=True, text=True
        )
        assert process.stderr.count("\n") == (1 if expected else 0), process.stderr
        _, code, seconds, loaded = process.stdout.splitlines()[-1].split()
        assert (int(code), loaded) == (expected, "False"), process.stdout
        if float(seconds) < 1:
            return
    pytest.fail(f"{arguments} took {seconds} s")


def test_names_and_mistakes(capsys):
    assert main([]) == 0
    output = capsys.readouterr().out
    assert all(f"\n  {command} " in output for command in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"astrolabe_diffusers {__version__}\n"
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == (
        f"error: there is no command 'trian' (did you mean train?); there are {', '.join(COMMANDS)}.\n"
    )


def test_a_command_gets_its_arguments(tmp_path, capsys):
    assert main(["score", str(tmp_path / "none.mp4")]) == 2
    assert "there is no video or folder" in capsys.readouterr().err
