"""Scores a video, or all videos of a folder, by any rewards: prints a table and writes JSON.

    python examples/score.py VIDEO_OR_FOLDER --prompt "a cat surfs a wave" --reward sharpness,dynamic_degree

`--help` lists the options.
"""

from __future__ import annotations

import sys

from astrolabe_diffusers.cli.arguments import ArgumentParser
from astrolabe_diffusers.cli.options import parse_fields
from astrolabe_diffusers.evaluation.score_files import ScoreConfig, score_videos
from astrolabe_diffusers.training import exit_code


def run(argv: list[str] | None):
    parser = ArgumentParser(description="Scores videos by any rewards.")
    parser.add_argument("videos", metavar="VIDEO_OR_FOLDER", help="a file, or a folder with .mp4 files")
    arguments = parse_fields(parser, ScoreConfig, argv)
    score_videos(arguments.pop("videos"), ScoreConfig(**arguments))


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
