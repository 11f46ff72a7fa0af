"""Command lines on which a slip is told in one line, with the right spelling."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence

from .errors import UserError, one_line


class Once(argparse.Action):
    """Stores the value of a flag that may be given once. argparse would silently take the last of several."""

    def __call__(self, parser, namespace, values, option_string=None):
        given = namespace.__dict__.setdefault("_given", set())
        if self.dest in given:
            raise UserError(f"{option_string} is given twice.")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


def parse_known(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """
    What `parser.parse_args(argv)` returns.

    Raises:
        UserError: where argparse would print its usage and end the program.
    """

    def fail(message: str):
        raise UserError(f"{one_line(message)} (--help lists the options)")

    parser.error = fail
    flags = [flag for action in parser._actions for flag in action.option_strings]
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = next((word for word in unknown if word.startswith("--")), unknown[0]).split("=")[0]
        raise UserError(f"unknown argument {flag}{close_matches(flag, flags)}.")
    vars(arguments).pop("_given", None)
    return arguments


def close_matches(name: str, names: Sequence[str]) -> str:
    """The names that `name` may be a slip of, as a remark to put behind it; empty if there is none."""
    matches = difflib.get_close_matches(name, names, n=3)
    return f" (did you mean {' or '.join(matches)}?)" if matches else ""
