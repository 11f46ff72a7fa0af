"""Settings: dataclasses whose values get the declared type and are checked when they are made."""

import importlib
import math
import operator
import types
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from .errors import UserError, as_user_error, close_matches, one_line
from .shareable import find_secret


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
    alone: str | None = None,
):
    """A field of a [`Config`] with its help; `above` and `below` are bounds that it may not reach. The flag of one of
    `many` parts, as that of a list, may be given several times; without a value it says `alone`."""
    bounds = {"at least": minimum, "at most": maximum, "more than": above, "less than": below}
    bounds = {words: bound for words, bound in bounds.items() if bound is not None}
    metadata = {"help": help, "choices": choices, "bounds": bounds, "many": many, "alone": alone}
    if isinstance(default, (dict, list)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def with_default(config_class: type["Config"], name: str, default: Any):
    """The field of this name of a [`Config`], as a subclass has it that differs in its default."""
    return field(default=default, metadata=config_class.__dataclass_fields__[name].metadata)


_WITHIN = {"at least": operator.ge, "at most": operator.le, "more than": operator.gt, "less than": operator.lt}


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
        [], "modules to import first, with classes that the model's folder names, or that register rewards; their "
        "folder has to be on PYTHONPATH"
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
            # A word that stands in the place of a number has none.
            if not isinstance(value, str) and not all(_WITHIN[words](value, b) for words, b in bounds.items()):
                listed = " and ".join(f"{words} {bound}" for words, bound in bounds.items())
                raise UserError(f"{f.name} must be {listed}, not {value}.")
        if found := find_secret(asdict(self)):
            name, problem = found
            raise UserError(
                f"{name} is {problem}, and settings are stored and shown: a secret comes from an environment "
                "variable (of a server of rewards ASTROLABE_REWARD_TOKEN; of an option its name, as in "
                "api_key_variable=MY_KEY)."
            )
        for name in self.import_modules:
            with as_user_error(f"import_modules {name} (is its folder on PYTHONPATH?)"):
                importlib.import_module(name)


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


FORMS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list[str]: "names, comma-separated",
    list[int]: "whole numbers, comma-separated",
    list[float]: "numbers, comma-separated",
    dict[str, float]: "name=weight, comma-separated, each weight a finite number",
    dict[str, str]: "name=place, comma-separated",
    dict[str, dict[str, Any]]: "name.argument=value, comma-separated",
}


def coerce(name: str, value: Any, hint: Any) -> Any:
    """A value from YAML or the command line as the type that the field declares, such as `int`, `int | None` or
    `int | Literal["auto"]`."""
    words = []
    if get_origin(hint) in (Union, types.UnionType):
        said = value.lower() if isinstance(value, str) else value
        if type(None) in get_args(hint) and said in (None, "none", "null"):
            return None
        words = [word for arg in get_args(hint) if get_origin(arg) is Literal for word in get_args(arg)]
        if said in words:
            return said
        hint = next(arg for arg in get_args(hint) if arg is not type(None) and get_origin(arg) is not Literal)
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
        kind = get_args(hint)[-1]
        if get_origin(hint) is list:
            if isinstance(value, dict):  # whose values would be lost
                raise ValueError
            value = [v for v in value.strip("[] ").split(",") if v.strip()] if isinstance(value, str) else value
            items = [str(v).strip().strip("'\"") for v in value]
            return [_finite(item) if kind is float else kind(item) for item in items]
        mapping = _parse_mapping(name, value, kind) if isinstance(value, str) else value
        if kind is float:
            return {str(key): _finite(weight) for key, weight in mapping.items()}
        if not all(isinstance(item, get_origin(kind) or kind) for item in mapping.values()):
            raise ValueError
        return {str(key): item for key, item in mapping.items()}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        of_options = hint == dict[str, dict[str, Any]] and not isinstance(value, str)
        form = " or ".join(["{name: {argument: value}}" if of_options else FORMS[hint], *words])
        raise UserError(f"{name} must be {form}, not {value!r}.") from error


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(number := float(value)):
        raise ValueError
    return number


def _parse_mapping(name: str, text: str, kind: Any) -> dict[str, Any]:
    """What `key=value,key=value` says. A weight may be left out; the key of an option is `name.argument`."""
    weights = kind is float
    if weights and text.strip().startswith("{"):
        return read_yaml(f"{name} is no valid YAML", text)
    values: dict[str, Any] = {}
    for part in filter(str.strip, text.split(",")):
        key, equals, value = (part.rpartition if weights else part.partition)("=")
        if not equals:
            if not weights:
                raise ValueError
            key, value = part, "1"
        key = key.strip()
        if key in values:
            raise UserError(f"{name}: {key} is given twice.")
        values[key] = value.strip()
    if kind is str or weights:
        return values
    options: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        reward, _, argument = key.rpartition(".")
        if not reward:
            raise ValueError
        options.setdefault(reward, {})[argument] = read_yaml(f"{name}: the value of {key} is no valid YAML", value)
    return options


def name_and_weight(text: str) -> tuple[str, float]:
    """What `"name=weight"` says; without a finite number behind its last `=` all of it is a name, of the weight 1."""
    name, _, weight = text.rpartition("=")
    try:
        return (name, _finite(weight)) if name else (text, 1.0)
    except ValueError:
        return text, 1.0
