"""`astrolabe train`."""

import argparse
import os
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..config import Config, coerce, read_yaml
from ..errors import UserError, as_user_error, close_matches
from ..files.text import read_text
from ..training.algorithms import ALGORITHMS, get_algorithm, get_config_class
from ..training.config import AUTO
from ..training.published_runs import (
    RECIPES,
    SIZES,
    PublishedRun,
    find_published_run,
    published_names,
    recommended_names,
)
from .arguments import ArgumentParser, command
from .options import parse_fields


DEFAULT_ALGORITHM = "nft"


@command
def main(argv: list[str] | None):
    parser = ArgumentParser(
        prog="astrolabe train",
        description="Trains a LoRA of a causal video model by online reinforcement learning.",
    )
    algorithm, settings, arguments = parse_settings(parser, argv)
    config = get_config_class(algorithm)(**settings | arguments)
    get_algorithm(algorithm)(config=config).train()


def parse_args(argv: list[str] | None = None) -> Config:
    """The settings, of the algorithm's class, that `--config NAME_OR_YAML` and `--any_field value` say."""
    algorithm, settings, arguments = parse_settings(ArgumentParser(), argv)
    return get_config_class(algorithm)(**settings | arguments)


def parse_settings(parser: ArgumentParser, argv: list[str] | None) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The algorithm's name; the settings that `--config` stands for, with sizes for this number of processes; and what
    the command line says, which goes before them, for the algorithm's settings and the parser's own arguments."""
    # Whose fields become flags is said by two of the flags.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", nargs="?")
    first.add_argument("--algorithm", nargs="?")
    given, _ = first.parse_known_args(argv)
    if given.config == "list":
        if _is_main():
            print(_table_of_runs(published_names()), "", "Of ours, none of them published:", sep="\n")
            print(_table_of_runs(recommended_names()))
        raise SystemExit(0)
    run = given.config and find_published_run(given.config)
    settings = run.settings if run else _read_recipe(given.config)
    written_for = settings.get("algorithm", DEFAULT_ALGORITHM)
    algorithm = given.algorithm or written_for
    config_class = get_config_class(algorithm)

    help = f"a YAML file, {_recipe_names()}, the name of a published run, or `list`, which prints these names"
    parser.add_argument("--config", metavar="", help=help)
    known = ", ".join(ALGORITHMS)
    help = f"{known}, or package.module:Class of your own; its settings are the fields below [{DEFAULT_ALGORITHM}]"
    parser.add_argument("--algorithm", metavar="", help=help)
    help = "of a published run not what was released, but what we would change of it (docs/published_runs.md)"
    parser.add_argument("--recommended", nargs="?", const="true", default="false", metavar="", help=help)
    arguments = parse_fields(parser, config_class, argv)
    recommended = coerce("recommended", arguments.pop("recommended"), bool)
    del arguments["config"], arguments["algorithm"]
    if run:
        settings = _for_processes(run, config_class, recommended, arguments)
    elif recommended:
        raise UserError("--recommended goes with the name of a published run; --config list prints them.")
    else:
        settings = settings | _batches_as_videos(settings, config_class, arguments)
    settings = _check_names(settings, get_config_class(written_for), config_class, given.config)
    names = [f.name for f in fields(config_class)]
    if (without_use := [name for name in settings if name not in names]) and _is_main():
        print(f"--config {given.config}: {algorithm} has no {', '.join(without_use)}, which {written_for} has")
    return algorithm, {name: value for name, value in settings.items() if name in names}, arguments


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _batches_as_videos(
    settings: dict[str, Any], config_class: type[Config], arguments: dict[str, Any]
) -> dict[str, int]:
    """How many videos the batches are that a recipe or the defaults count, where only the command line has batches of
    `auto`: then batches are counted as videos."""
    name = "train_batch_size"
    if name not in arguments or config_class(**{name: arguments[name]}).train_batch_size != AUTO:
        return {}
    written = {f.name: settings.get(f.name, f.default) for f in fields(config_class)}
    if written[name] == AUTO:
        return {}
    counts = {name: written[name] for name in ("batches_per_epoch", "gradient_accumulation_steps")}
    return {count: written[name] * number for count, number in counts.items() if number is not None}


def _for_processes(
    run: PublishedRun, config_class: type[Config], recommended: bool, arguments: dict[str, Any]
) -> dict[str, Any]:
    given = {name: arguments[name] for name in SIZES if name in arguments}
    checked = config_class(**given)  # numbers, and none of them zero
    given = {name: getattr(checked, name) for name in given}
    with as_user_error("the environment variable WORLD_SIZE"):
        num_processes = int(os.environ.get("WORLD_SIZE", 1))
    values, sizes = run.settings_for(num_processes, given)
    changed, kind = run.choose(recommended, [name for name in arguments if name not in SIZES])
    if _is_main():
        print(f"{sizes}\n{kind}")
    return values | changed


def _recipe_names() -> str:
    return ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))


def _read_recipe(config: str | None) -> dict[str, Any]:
    if config is None:
        return {}
    path = Path(config)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{config}.yaml"
    if not path.is_file():
        names = [file.stem for file in RECIPES.glob("*.yaml")]
        raise UserError(
            f"--config {config}: no such file and no such name"
            f"{close_matches(config, [*names, *published_names(), *recommended_names()])}; the names are "
            f"{_recipe_names()}, and those of published runs, which --config list prints."
        )
    with as_user_error("--config"):
        text = read_text(path)
    values = read_yaml(f"{path} is no valid YAML", text) or {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold `field: value` lines.")
    return values


def _check_names(
    values: dict[str, Any], written_for: type[Config], config_class: type[Config], config: str | None
) -> dict[str, Any]:
    """The settings by the present names of fields, of which each is one of the algorithm that they are for, or of the
    one that they were written for."""
    values = {name: value for name, value in values.items() if name != "algorithm"}
    for old, new in config_class.aliases.items():
        if old in values:
            if new in values:
                raise UserError(f"--config {config}: {old} is an older name of {new}, and both are given.")
            values[new] = values.pop(old)
    names = list({f.name: None for f in (*fields(config_class), *fields(written_for))})
    unknown = [name for name in values if name not in names]
    if unknown:
        removed = {name: f" ({advice})" for name, advice in config_class.removed.items()}
        known = "; ".join(f"{name}{removed.get(name) or close_matches(str(name), names)}" for name in unknown)
        raise UserError(f"--config {config}: unknown field{'s' if len(unknown) > 1 else ''} {known}.")
    return values


def _table_of_runs(names: Iterable[str]) -> str:
    """A table of runs that `--config` knows by these names."""
    rows = [("name", "model", "rewards", "processes x batch x batches", "group")]
    for name in names:
        run = find_published_run(name)
        settings = run.settings
        rewards = ", ".join(reward if w == 1 else f"{reward}={w:g}" for reward, w in settings["rewards"].items())
        size = f"{run.processes} x {settings['train_batch_size']} x {settings['batches_per_epoch']}"
        rows.append((name, settings["model"], rewards, size, str(settings["samples_per_prompt"])))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
