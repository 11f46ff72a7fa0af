"""examples/score.py, in this process."""

import json
import sys
from pathlib import Path

import numpy as np

from astrolabe_diffusers.files.video import VideoWriter


sys.path.append(str(Path(__file__).parents[2] / "examples"))
import score  # noqa: E402


def test_scores_of_a_file(tmp_path, capsys):
    path = tmp_path / "a.mp4"
    with VideoWriter(path, 32, 48, 16) as writer:
        writer.write(np.full((5, 32, 48, 3), 102, np.uint8))
    brightness = "tests.training.rewards:brightness"
    arguments = [str(path), "--prompt", "a gray wall", "--rewards", f"{brightness}=2,flicker=0", "--output"]
    assert score.main([*arguments, str(tmp_path / "out.json")]) == 0
    (video,) = json.loads((tmp_path / "out.json").read_text())["videos"]
    assert abs(video["scores"][brightness] - 0.4) < 0.01 and video["prompt"] == "a gray wall"
    assert video["scores"]["reward"] == 2 * video["scores"][brightness]
    assert f"{video['scores'][brightness]:.4f}" in capsys.readouterr().out


def test_mistakes_are_one_line(tmp_path, capsys):
    for arguments, words in (
        ([], "VIDEO_OR_FOLDER"),
        ([str(tmp_path / "a.mp4")], "there is no video or folder"),
        ([str(tmp_path), "--rewrds", "flicker"], "unknown argument --rewrds (did you mean --rewards"),
    ):
        assert score.main(arguments) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
