"""Settings: dataclasses whose values get the declared type and are checked when they are made."""

from __future__ import annotations

import importlib
import math
import operator
import types
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

import yaml

from .errors import UserError, as_user_error, one_line
from .shareable import find_secret
from .spelling import close_matches


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    many: bool = False,
):
    """A field of a [`Config`] with its help; `above` and `below` are bounds that it may not reach. The flag of one of
    `many` parts, as that of a list, may be given several times."""
    bounds = {"at least": minimum, "at most": maximum, "more than": above, "less than": below}
    bounds = {words: bound for words, bound in bounds.items() if bound is not None}
    metadata = {"help": help, "choices": choices, "bounds": bounds, "many": many}
    if isinstance(default, (dict, list)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def import_modules(names: list[str]):
    """Imports modules of the user's, so that diffusers finds their classes; a [`UserError`] if one is not there."""
    for name in names:
        with as_user_error(f"import_modules {name} (is its folder on PYTHONPATH?)"):
            importlib.import_module(name)


_WITHIN = {"at least": operator.ge, "at most": operator.le, "more than": operator.gt, "less than": operator.lt}


def refuse_secrets(settings: dict[str, Any]):
    """A [`UserError`] if a setting holds a secret: settings are written down and shown."""
    if found := find_secret(settings):
        name, problem = found
        raise UserError(
            f"{name} is {problem}, and settings are stored and shown: a secret comes from an environment variable (of "
            "a server of rewards ASTROLABE_REWARD_TOKEN; of an option its name, as in api_key_variable=MY_KEY)."
        )


@dataclass
class Config:
    """Base of dataclasses whose fields are [`option`]s: values get the declared type and are checked when made.

    Raises:
        UserError: a value is not of its field's type, none of its choices or out of its bounds.
    """

    # Fields that there were, and what has come in their place.
    removed: ClassVar[dict[str, str]] = {}
    # Older names of fields, on the command line and in YAML, and what they are called now.
    aliases: ClassVar[dict[str, str]] = {}

    import_modules: list[str] = option(
        [], "modules with classes of your own that the model's folder names; their folder has to be on PYTHONPATH"
    )

    def __post_init__(self):
        hints = get_type_hints(type(self))
        for f in fields(self):
            value = coerce(f.name, getattr(self, f.name), hints[f.name])
            setattr(self, f.name, value)
            if value is None:
                continue
            choices, bounds = f.metadata["choices"], f.metadata["bounds"]
            if choices is not None and value not in choices:
                near = close_matches(str(value), choices)
                raise UserError(f"{f.name} must be one of {', '.join(choices)}, not {value!r}{near}.")
            if not all(_WITHIN[words](value, bound) for words, bound in bounds.items()):
                listed = " and ".join(f"{words} {bound}" for words, bound in bounds.items())
                raise UserError(f"{f.name} must be {listed}, not {value}.")
        refuse_secrets(asdict(self))
        import_modules(self.import_modules)


class UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which PyYAML silently takes the last."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if key != "<<" and keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(problem: str, text: str) -> Any:
    """What a YAML text says; a [`UserError`] that begins with `problem` if it is none."""
    try:
        return yaml.load(text, Loader=UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{problem}: {one_line(error)}") from error


_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list[str]: "names, comma-separated",
    list[int]: "whole numbers, comma-separated",
    list[float]: "numbers, comma-separated",
}


def coerce(name: str, value: Any, hint: Any) -> Any:
    """A value from YAML or the command line as the type that the field declares."""
    if hint in _MAPPINGS:
        return _MAPPINGS[hint](name, value)
    if get_origin(hint) in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        hint = next(arg for arg in get_args(hint) if arg is not type(None))
    try:
        if hint is str:
            if not isinstance(value, (str, int, float, Path)) or isinstance(value, bool):
                raise ValueError
            return str(value)
        if hint is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if hint is int:
            if isinstance(value, bool) or float(value) != int(float(value)):
                raise ValueError
            return int(value) if isinstance(value, str) and value.lstrip("+-").isdigit() else int(float(value))
        if hint is float:
            # YAML reads 1e-4 as a string: it wants 1.0e-4.
            return _finite(value)
        if get_origin(hint) is list:
            value = [v for v in value.strip("[] ").split(",") if v.strip()] if isinstance(value, str) else value
            items = [str(v).strip().strip("'\"") for v in value]
            kind = get_args(hint)[0]
            return [_finite(item) if kind is float else kind(item) for item in items]
        weights = _parse_weights(name, value) if isinstance(value, str) else value
        return {str(key): _finite(weight) for key, weight in weights.items()}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        expected = _TYPE_NAMES.get(hint, "name=weight, comma-separated, each weight a finite number")
        raise UserError(f"{name} must be {expected}, not {value!r}.") from error


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(number := float(value)):
        raise ValueError
    return number


def _to_places(name: str, value: Any) -> dict[str, str]:
    if isinstance(value, str):
        value = dict(_pairs(name, value, "name=place"))
    if not isinstance(value, dict) or not all(isinstance(place, str) for place in value.values()):
        raise UserError(f"{name} must be name=place, comma-separated, not {value!r}.")
    return {str(key): place for key, place in value.items()}


def _to_options(name: str, value: Any) -> dict[str, dict[str, Any]]:
    form = "name.argument=value"
    if isinstance(value, str):
        options: dict[str, dict[str, Any]] = {}
        for key, text in _pairs(name, value, form):
            reward, _, argument = key.rpartition(".")
            if not reward:
                raise UserError(f"{name} must be {form}, comma-separated, not {value!r}.")
            options.setdefault(reward, {})[argument] = read_yaml(f"{name}: the value of {key} is no valid YAML", text)
        return options
    if not isinstance(value, dict) or not all(isinstance(arguments, dict) for arguments in value.values()):
        raise UserError(f"{name} must be {{name: {{argument: value}}}}, not {value!r}.")
    return {str(key): arguments for key, arguments in value.items()}


_MAPPINGS = {dict[str, dict[str, Any]]: _to_options, dict[str, str]: _to_places}


def _pairs(name: str, text: str, form: str) -> list[tuple[str, str]]:
    parts = [part.partition("=") for part in text.split(",") if part.strip()]
    if not all(equals for _, equals, _ in parts):
        raise UserError(f"{name} must be {form}, comma-separated, not {text!r}.")
    return _each_once(name, [(key.strip(), value.strip()) for key, _, value in parts])


def _each_once(name: str, pairs: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    keys = [key for key, _ in pairs]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise UserError(f"{name}: {twice[0]} is given twice.")
    return pairs


def _parse_weights(name: str, text: str) -> dict[str, Any]:
    if text.strip().startswith("{"):
        return read_yaml(f"{name} is no valid YAML", text)
    parts = [part.rpartition("=") for part in text.split(",") if part.strip()]
    pairs = [(key.strip(), weight) if equals else (weight.strip(), 1.0) for key, equals, weight in parts]
    return dict(_each_once(name, pairs))


def name_and_weight(text: str) -> tuple[str, float]:
    """What `"name=weight"` says; without a finite number behind its last `=` all of it is a name, of the weight 1."""
    name, _, weight = text.rpartition("=")
    try:
        return (name, _finite(weight)) if name else (text, 1.0)
    except ValueError:
        return text, 1.0
