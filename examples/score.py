"""Scores a video, or all videos of a folder, by any rewards: prints a table and writes JSON.

    python examples/score.py VIDEO_OR_FOLDER --prompt "a cat surfs a wave" --rewards sharpness,dynamic_degree

`--help` lists the options.
"""

from astrolabe_diffusers.cli.score import main


if __name__ == "__main__":
    raise SystemExit(main())
