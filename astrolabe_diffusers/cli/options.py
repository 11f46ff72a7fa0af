"""Flags of the fields of a settings class."""

import argparse
from dataclasses import MISSING, fields
from typing import Any, get_origin, get_type_hints

from ..config import Config
from ..errors import UserError
from .arguments import ArgumentParser


def parse_fields(parser: ArgumentParser, config_class: type[Config], argv: list[str] | None) -> dict[str, Any]:
    """What the command line says, with `--field value` for every field of `config_class` beside the parser's own.

    The parts of a list are separated by commas or blanks, or its flag is given several times.
    """
    hints, silent = get_type_hints(config_class), {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    for f in fields(config_class):
        # As declared: what a made object has may follow from other fields.
        default = f.default if f.default_factory is MISSING else f.default_factory()
        choices = f" ({' | '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
        shown = "" if default in (None, [], {}) else f" [{default}]"
        text = f"{f.metadata['help']}{choices}{shown}".replace("%", "%%")
        alone = "true" if hints[f.name] is bool else f.metadata["alone"]
        kind = {"nargs": "?", "const": alone} if alone else {}
        if f.metadata["many"] or get_origin(hints[f.name]) is list:
            kind = {"action": "extend", "nargs": "+"}
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, metavar="", help=text, **kind)
        for alias in (old for old, new in config_class.aliases.items() if new == f.name):
            parser.add_argument(f"--{alias}", dest=f.name, **silent, **kind)
    for name, advice in config_class.removed.items():
        parser.add_argument(f"--{name}", action=_Removed, nargs="?", const=advice, **silent)
    arguments = parser.parse_args(argv)
    return {name: ",".join(v) if isinstance(v, list) else v for name, v in vars(arguments).items()}


class _Removed(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        raise UserError(f"there is no {option_string} any more: {self.const}.")
