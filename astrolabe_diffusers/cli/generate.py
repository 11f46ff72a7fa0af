"""`astrolabe generate`."""

from __future__ import annotations

import os
import signal
import sys

from ..errors import exit_code
from ..generation.config import GenerationConfig
from .arguments import ArgumentParser
from .options import parse_fields


def run(argv: list[str] | None):
    parser = ArgumentParser(
        prog="astrolabe generate",
        description="Generates many videos, on all processes of `accelerate launch`, and writes each as MP4 while it "
        "is generated. The same command again makes what is missing.",
    )
    config = GenerationConfig(**parse_fields(parser, GenerationConfig, argv))
    from ..generation.run import generate_videos

    generate_videos(config)


def main(argv: list[str] | None = None) -> int:
    try:
        return exit_code(lambda: run(argv))
    except KeyboardInterrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("interrupted: the same command makes the videos that are missing.", file=sys.stderr)
        return 128 + signal.SIGINT
