"""examples/benchmarks/live.py: viewers of a server, and the encoders."""


def test_what_a_viewer_sees(capsys):
    from live import main

    (seen,) = main(["--model", "tiny_shapes", "--seconds", "6", "--codec", "jpeg"])
    assert 0 < seen.first_frame < 10 and 6 * 16 * 0.5 < seen.frames <= 6 * 16 + 1
    assert seen.delays and 0 < seen.delay_median <= seen.delay_p95 < 10
    assert 0.1 < seen.memory_first <= seen.memory_last * 1.2 and seen.megabits_per_second > 0.01
    assert "underruns" in capsys.readouterr().out


def test_what_encoding_costs():
    from live import main

    figures = main(["--encoding", "--height", "96", "--width", "160"])
    assert list(figures) == ["h264", "jpeg", "webp"]
    assert all(milliseconds > 0 and 0.1 < kilobytes < 46 and decibels > 25 for milliseconds, kilobytes, decibels in
               figures.values())  # fmt: skip
