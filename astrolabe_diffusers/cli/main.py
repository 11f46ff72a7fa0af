"""`astrolabe COMMAND`: what the package does, by name."""

import importlib
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import UserError, close_matches, exit_code


# Each is a module beside this one, which imports what is large only once its arguments are found right.
COMMANDS = {
    "train": "trains a LoRA of a causal video model by online reinforcement learning",
    "generate": "generates many videos",
    "live": "opens a page on which a video follows what is typed",
    "evaluate": "scores a model's videos with and without LoRAs, from the same seeds",
    "score": "scores videos that are there",
    "serve": "serves rewards over HTTP",
    "convert": "makes a Diffusers folder of published weights",
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    several = "On several processes: accelerate launch -m astrolabe_diffusers.cli.main COMMAND ..."
    return f"usage: astrolabe COMMAND [--help] ...\n\n{lines}\n\n{several}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; `argv` are the arguments, those of the process if `None`."""
    command, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(usage())
    elif command == "--version":
        print(f"astrolabe_diffusers {__version__}")
    elif command in COMMANDS:
        return importlib.import_module(f".{command}", __package__).main(arguments)
    else:
        return exit_code(lambda: _refuse(command))
    return 0


def _refuse(command: str):
    raise UserError(
        f"there is no command {command!r}{close_matches(command, COMMANDS)}; there are {', '.join(COMMANDS)}."
    )


if __name__ == "__main__":
    sys.exit(main())
