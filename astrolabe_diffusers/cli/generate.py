"""`astrolabe generate`."""

import os
import signal
import sys

from ..errors import Interrupted
from ..generation.config import GenerationConfig
from .arguments import ArgumentParser, command
from .options import parse_fields


@command
def main(argv: list[str] | None):
    parser = ArgumentParser(
        prog="astrolabe generate",
        description="Generates many videos, on all processes of `accelerate launch`, and writes each as MP4 while it "
        "is generated. The same command again makes what is missing.",
    )
    config = GenerationConfig(**parse_fields(parser, GenerationConfig, argv))
    try:
        if config.session:
            from ..live.load import generate_session

            generate_session(config)
        else:
            from ..generation.run import generate_videos

            generate_videos(config)
    except KeyboardInterrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("interrupted: the same command makes the videos that are missing.", file=sys.stderr)
        raise Interrupted(signal.SIGINT) from None
