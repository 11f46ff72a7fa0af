"""How a name finds a reward, and what it may be given."""

import importlib
import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Union, get_args, get_origin

from ..config import FORMS
from ..errors import close_matches, is_missing
from .reward import FunctionReward, Reward


# A class, or one with some of its options, by each name.
_REGISTRY: dict[str, type[Reward] | partial] = {}


def _registered() -> dict[str, type[Reward] | partial]:
    """The rewards by name; the built-in ones register when they are imported, which settings alone do not need."""
    from . import built_in  # noqa: F401

    return _REGISTRY


def register_reward(name: str, **options: Any) -> Callable[[type[Reward]], type[Reward]]:
    """Class decorator: makes a `Reward`, with these `options`, known by `name`. A name that is taken raises
    `ValueError`."""

    def register(cls: type[Reward]) -> type[Reward]:
        if name in (known := _registered()):
            raise ValueError(f"the reward name {name!r} is taken by {_class_of(known[name]).__qualname__}.")
        known[name] = partial(cls, **options) if options else cls
        return cls

    return register


def get_reward(name: str, defaults: dict[str, Any] | None = None, **options: Any) -> Reward:
    """
    Makes the reward that `name` means, with these options; a `ValueError`, which lists those that there are, if
    nothing has that name, or it has no such option.

    Args:
        name: a registered name, or the dotted path "package.module:Name" or "package.module.Name" of a `Reward`
            subclass or of a function, see `FunctionReward`.
        defaults: further options, for a reward that has them: `{"fps": 16.0}`, frames a second of the videos.
    """
    return make_reward(name, name, options, defaults)


def make_reward(
    name: str, source: str | Reward | Callable, options: dict[str, Any], defaults: dict[str, Any] | None = None
) -> Reward:
    """The reward that is called `name` from now on; arguments as those of [`get_reward`]. `source` is what that knows
    by a name, or a function or a `Reward` subclass, to be made with these options, or a `Reward`, which has its own.
    """
    if isinstance(source, str):
        source = _find(source)
    if isinstance(source, Reward):
        if options:
            raise ValueError(f"reward {name!r} is made already and takes no option {next(iter(options))!r}.")
        return source
    signature, is_class = _signature(source), _class_of(source) is not None
    # The first three arguments of a function are videos, prompts and metadata.
    parameters = list(signature.parameters.values())[0 if is_class else 3 :]
    known = [parameter.name for parameter in parameters if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    unknown = [option for option in options if option not in known]
    if unknown and len(known) == len(parameters):
        raise ValueError(f"reward {name!r} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}.")
    for parameter in parameters:
        if parameter.name in options:
            _check_option(name, parameter, options[parameter.name])
    options = {option: value for option, value in (defaults or {}).items() if option in known} | options
    if is_class:
        return source(**options)
    try:
        signature.bind(None, None, None, **options)
    except TypeError as error:
        raise ValueError(f"reward {name!r} cannot be called with (videos, prompts, metadata): {error}.") from None
    return FunctionReward(source, **options)


def named_reward_funcs(
    reward_funcs: str | Reward | Callable | Iterable[str | Reward | Callable],
) -> dict[str, str | Reward | Callable]:
    """Rewards, or a single one, by names of their own, for `RewardSet`: a text is its own, a function has its
    `__name__`, and a `Reward` or its class the registered name or else that of the class in snake case. A `ValueError`
    if something is no reward, or two have one name."""
    # A mapping, whose weights would be lost, is no reward.
    if isinstance(reward_funcs, str | Mapping) or not isinstance(reward_funcs, Iterable):
        reward_funcs = [reward_funcs]
    named = {}
    for source in reward_funcs:
        name = source if isinstance(source, str) else _name_of(source)
        if name in named:
            raise ValueError(f"two rewards are called {name!r}; give one of them another __name__.")
        named[name] = source
    return named


def _name_of(source: Reward | Callable) -> str:
    source = source.function if isinstance(source, FunctionReward) else source
    cls = type(source) if isinstance(source, Reward) else _class_of(source)
    if cls is not None:
        registered = [name for name, known in _registered().items() if _class_of(known) is cls]
        return registered[0] if len(registered) == 1 else re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()
    if not _is_function(source):
        raise ValueError(f"{source!r} is neither a name, nor a function, nor a Reward.")
    while isinstance(source, partial):
        source = source.func
    return getattr(source, "__name__", type(source).__name__).strip("<>")


def _class_of(source: Any) -> type[Reward] | None:
    """Of which class a call of `source` makes a reward, if it does."""
    source = source.func if isinstance(source, partial) else source
    return source if isinstance(source, type) and issubclass(source, Reward) else None


def _is_function(source: Any) -> bool:
    return callable(source) and not isinstance(source, type)


def assumed_fps(source: str | Reward | Callable, options: dict[str, Any]) -> float | None:
    """The frames a second that what [`make_reward`] makes takes its videos to have, if that matters to it and these
    options do not tell."""
    source = _find(source) if isinstance(source, str) else source
    if isinstance(source, Reward) or "fps" in options:
        return None
    parameter = _signature(source).parameters.get("fps")
    return parameter and parameter.default


def _find(name: str) -> type[Reward] | partial | Callable:
    known = _registered()
    if name in known:
        return known[name]
    names = ", ".join(sorted(known))
    module_name, _, attribute = name.rpartition(":" if ":" in name else ".")
    if "=" in name:
        raise ValueError(f"{name!r} has a weight, where rewards are only named: {name.partition('=')[0]}.")
    if not module_name or not attribute:
        near = close_matches(name, known)
        raise ValueError(f"unknown reward {name!r}{near}; known: {names}, or a dotted path 'package.module:Name'.")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not is_missing(module_name, error):
            raise
        problem = f"no module named {error.name!r} (is its folder on PYTHONPATH?)"
        raise ValueError(f"unknown reward {name!r}: {problem}; known: {names}.") from None
    target = getattr(module, attribute, None)
    if _class_of(target) or _is_function(target):
        return target
    problem = f"holds a {type(target).__name__} there"
    if target is None:
        problem = f"has no such attribute{close_matches(attribute, vars(module))}"
    raise ValueError(f"reward {name!r} is neither a Reward subclass nor a function: {module_name} {problem}.")


def _signature(function: Callable) -> inspect.Signature:
    try:
        return inspect.signature(function, eval_str=True)
    except (NameError, TypeError):  # of what is only imported for type checkers
        return inspect.signature(function)


_FORMS = {**FORMS, Sequence: "a list", types.NoneType: "null"}


def _check_option(name: str, parameter: inspect.Parameter, value: Any):
    """`ValueError` unless a value is of the type that is declared, or, where none is, of the kind of the default."""
    hint = parameter.annotation
    if hint is parameter.empty or isinstance(hint, str):
        kind = type(parameter.default)
        # Who writes 1 as a default need not mean whole numbers.
        hint = float if kind in (int, float) else kind if kind in (str, bool) else Any
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds = [get_origin(kind) or kind for kind in kinds]
    if not any(_is_a(value, kind) for kind in kinds):
        wanted = " or ".join(_FORMS.get(kind, getattr(kind, "__name__", str(kind))) for kind in kinds)
        raise ValueError(f"the option {parameter.name!r} of reward {name!r} must be {wanted}, not {value!r}.")


def _is_a(value: Any, kind: Any) -> bool:
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool) and value == value  # no NaN
    # What is no class, such as `Any`, is not for us to check.
    return not isinstance(kind, type) or kind is Any or isinstance(value, kind)
