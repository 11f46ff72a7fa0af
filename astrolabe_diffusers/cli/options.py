"""Flags of the fields of a settings class."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

from ..config import Config
from ..errors import UserError
from .arguments import ArgumentParser


def parse_fields(parser: ArgumentParser, config_class: type[Config], argv: list[str] | None) -> dict[str, Any]:
    """What the command line says, with `--field value` for every field of `config_class` beside the parser's own.

    A list is comma-separated, or its flag is given several times.
    """
    hints = get_type_hints(config_class)
    kinds = {
        bool: {"nargs": "?", "const": "true"},
        list[str]: {"action": "append"},
        list[int]: {"action": "append"},
        list[float]: {"action": "append"},
    }
    for f in fields(config_class):
        # As declared: what a made object has may follow from other fields.
        default = f.default if f.default_factory is MISSING else f.default_factory()
        choices = f" ({' | '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
        shown = "" if default is None else f" [{default}]"
        text = f"{f.metadata['help']}{choices}{shown}".replace("%", "%%")
        kind = kinds.get(hints[f.name], {})
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, metavar="", help=text, **kind)
        for alias in (old for old, new in config_class.aliases.items() if new == f.name):
            silent = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
            parser.add_argument(f"--{alias}", dest=f.name, **silent, **kind)
    for name, advice in config_class.removed.items():
        silent = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        parser.add_argument(f"--{name}", action=_Removed, nargs="?", const=advice, **silent)
    arguments = parser.parse_args(argv)
    return {name: ",".join(v) if isinstance(v, list) else v for name, v in vars(arguments).items()}


class _Removed(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        raise UserError(f"there is no {option_string} any more: {self.const}.")
