"""The benchmark of rewards at small size: that the published way it compares with gives the same scores."""

import pytest


@pytest.mark.parametrize("name, rows", [("hpsv3", 3), ("videoalign", 2)])
def test_both_ways_give_the_same_scores(name, rows, capsys):
    from rewards import main

    size = ["--num_frames", "5", "--height", "60", "--width", "100", "--clips", "2", "--repetitions", "1"]
    lines = main(["--tiny", "--device", "cpu", "--rewards", name, *size])
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")][2:]
    assert len(cells) == rows and "published way" in cells[0][0]
    difference, spread = (float(value) for value in cells[-1][-2:])
    assert difference <= 0.02 * spread and spread > 0
    assert all(float(row[1]) > 0 for row in cells)
    assert capsys.readouterr().out.strip().endswith(lines[-2])
