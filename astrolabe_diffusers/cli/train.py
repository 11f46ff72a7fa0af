"""The command line of a training run."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..config import coerce, read_yaml
from ..errors import UserError, as_user_error
from ..files.text import read_text
from ..spelling import close_matches
from ..training.nft.config import NFTConfig
from ..training.published_runs import RECIPES, SIZES, find_published_run, list_published_runs
from .arguments import ArgumentParser
from .options import parse_fields


def parse_args(argv: list[str] | None = None, recipes: Path = RECIPES) -> NFTConfig:
    """Settings from `--config NAME_OR_YAML` and `--any_field value`; the command line goes before the file.

    Args:
        argv: the arguments; those of the process if `None`.
        recipes: folder in which `--config NAME` finds `NAME.yaml`.
    """
    parser = ArgumentParser(
        description="Trains a LoRA of a causal video model with NFT (online reinforcement learning)."
    )
    arguments = parse_settings(parser, argv, recipes)
    return NFTConfig(**{**arguments.pop("config"), **arguments})


def parse_settings(parser: ArgumentParser, argv: list[str] | None, recipes: Path = RECIPES) -> dict[str, Any]:
    """What the command line says for [`NFTConfig`] and the parser's own arguments; `config` holds the settings that
    `--config` stands for, with sizes for this number of processes."""
    names = ", ".join(_recipe_names(recipes))
    help = f"a YAML file, {names}, the name of a published run, or `list`, which prints these names"
    parser.add_argument("--config", help=help)
    help = "of a published run not what was released, but what we would change of it (docs/published_runs.md)"
    parser.add_argument("--recommended", nargs="?", const="true", default="false", metavar="", help=help)
    arguments = parse_fields(parser, NFTConfig, argv)
    recommended = coerce("recommended", arguments.pop("recommended"), bool)
    return arguments | {"config": _named_settings(arguments["config"], recommended, arguments, recipes)}


def _named_settings(
    config: str | None, recommended: bool, arguments: dict[str, Any], recipes: Path
) -> dict[str, Any]:
    is_main = os.environ.get("RANK", "0") == "0"
    if config == "list":
        if is_main:
            print(list_published_runs())
        raise SystemExit(0)
    run = config and find_published_run(config)
    if run:
        given = {name: arguments[name] for name in SIZES if name in arguments}
        checked = NFTConfig(**given)  # numbers, and none of them zero
        given = {name: getattr(checked, name) for name in given}
        with as_user_error("the environment variable WORLD_SIZE"):
            num_processes = int(os.environ.get("WORLD_SIZE", 1))
        values, sizes = run.settings_for(num_processes, given)
        changed, kind = run.choose(recommended, [name for name in arguments if name not in SIZES])
        if is_main:
            print(f"{sizes}\n{kind}")
        return values | changed
    if recommended:
        raise UserError("--recommended goes with the name of a published run; --config list prints them.")
    return _read_config(config, recipes, [f.name for f in fields(NFTConfig)])


def _recipe_names(recipes: Path) -> list[str]:
    return sorted(path.stem for path in recipes.glob("*.yaml"))


def _read_config(config: str | None, recipes: Path, names: list[str]) -> dict[str, Any]:
    if config is None:
        return {}
    path = Path(config)
    if path.suffix not in (".yaml", ".yml"):
        path = recipes / f"{config}.yaml"
    if not path.is_file():
        known = ", ".join(_recipe_names(recipes))
        raise UserError(f"--config {config}: no such file and no such name; the names are: {known}.")
    with as_user_error("--config"):
        text = read_text(path)
    values = read_yaml(f"{path} is no valid YAML", text) or {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold `field: value` lines.")
    for old, new in NFTConfig.aliases.items():
        if old in values:
            if new in values:
                raise UserError(f"{path}: {old} is an older name of {new}, and both are given.")
            values[new] = values.pop(old)
    unknown = [name for name in values if name not in names]
    if unknown:
        removed = {name: f" ({advice})" for name, advice in NFTConfig.removed.items()}
        known = "; ".join(f"{name}{removed.get(name) or close_matches(str(name), names)}" for name in unknown)
        raise UserError(f"{path}: unknown field{'s' if len(unknown) > 1 else ''} {known}.")
    return values
