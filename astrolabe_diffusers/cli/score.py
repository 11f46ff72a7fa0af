"""`astrolabe score`."""

from ..evaluation.config import ScoreConfig
from .arguments import ArgumentParser, command
from .options import parse_fields


@command
def main(argv: list[str] | None):
    parser = ArgumentParser(prog="astrolabe score", description="Scores videos by any rewards.")
    parser.add_argument("videos", metavar="VIDEO_OR_FOLDER", help="a file, or a folder with .mp4 files")
    arguments = parse_fields(parser, ScoreConfig, argv)
    videos, config = arguments.pop("videos"), ScoreConfig(**arguments)
    from ..evaluation.score_files import score_videos

    score_videos(videos, config)
