"""Command lines on which a slip is told in one line, with the right spelling."""

import argparse
from collections.abc import Callable, Sequence
from typing import NoReturn

from ..errors import UserError, close_matches, exit_code, one_line


def command(run: Callable[[list[str] | None], object]) -> Callable[..., int]:
    """Makes a command's main of what it does with its arguments, those of the process if `None`: it returns the
    [`exit_code`]."""
    return lambda argv=None: exit_code(lambda: run(argv))


class ArgumentParser(argparse.ArgumentParser):
    """
    argparse's, with [`UserError`]s where that prints its usage and ends the program, the nearest flags beside a wrong
    one, no abbreviations, and no flag that silently goes before the same one given earlier: a flag with several values
    says so by its action, `"append"` or `"extend"`.
    """

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)
        self.register("action", None, _StoreOnce)
        self._given: set[str] = set()

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{one_line(message)} (--help lists the options)")

    def parse_args(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        self._given.clear()
        arguments, unknown = self.parse_known_args(argv)
        if unknown:
            flag = next((word for word in unknown if word.startswith("--")), unknown[0]).split("=")[0]
            flags = [flag for action in self._actions for flag in action.option_strings]
            raise UserError(f"unknown argument {flag}{close_matches(flag, flags)}.")
        return arguments

    def _check_value(self, action: argparse.Action, value):
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            near = close_matches(str(value), choices)
            raise argparse.ArgumentError(action, f"there is no {value!r}{near}; it can be {', '.join(choices)}")


class _StoreOnce(argparse._StoreAction):
    def __call__(self, parser, namespace, values, option_string=None):
        if self.dest in parser._given:
            raise UserError(f"{option_string} is given twice.")
        parser._given.add(self.dest)
        super().__call__(parser, namespace, values, option_string)
