"""What of the settings may be stored, and what of them may leave this machine."""

import os
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any


# Places and servers of rewards: no one else's business, and no figure depends on them.
MACHINE = ("reward_placement", "reward_timeout")

# Of URLs: `scheme://user:password@host`, and a secret in the query.
_USER = re.compile(r"\b[a-z][a-z0-9+.-]*://[^/\s?#]*@", re.IGNORECASE)
_SECRET = r"(?:api|access|secret|private|auth)_?key|token|secret|pass(?:word|wd|phrase)?|credentials?|authorization"
_SECRET_QUERY = re.compile(rf"://[^\s?]*\?(?:[^\s]*&)?(?:\w*_)?(?:{_SECRET})=", re.IGNORECASE)
_SECRET_NAME = re.compile(rf"(?:.*[_-])?(?:{_SECRET})", re.IGNORECASE)

# What names a server: a URL, host:port, or an option that is called so.
_SERVER = re.compile(r"[a-z][a-z0-9+.-]*://|(?:localhost|[\w-]+(?:\.[\w-]+)+):\d+(?:/|$)", re.IGNORECASE)
_SERVER_NAME = re.compile(r"(?:.*_)?(?:url|uri|host|hostname|server|address|addr|endpoint)", re.IGNORECASE)
# A path inside a text, also behind `NAME=`; a `/` between words, as in the id of a model, begins none.
_PATH = re.compile(r"(?<![^\s=,;:|\"'(\[])(?:~|\.{1,2})?(?:/[^/\s,;:|\"'=]+)+/?")


def find_secret(settings: dict[str, Any]) -> tuple[str, str] | None:
    """The first setting, `name` or `name.argument`, that holds a secret, and what is wrong with it: settings are
    stored, shown and printed."""
    for name, key, value in _leaves(settings):
        if name == "prompt":  # meant to be shown
            continue
        if isinstance(value, str) and (_USER.search(value) or _SECRET_QUERY.search(value)):
            return name, "an address with a user, a password or a key in it"
        if value is not None and "." in name and _SECRET_NAME.fullmatch(key):
            return name, "named like a secret"
    return None


def _leaves(value: Any, name: str = "", key: str = "") -> Iterator[tuple[str, str, Any]]:
    """Name, last part of the name, and value of everything in nested settings; names are values too."""
    if isinstance(value, dict):
        for part, item in value.items():
            yield name, "", part
            yield from _leaves(item, f"{name}.{part}" if name else str(part), str(part))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item, name, key)
    else:
        yield name, key, value


def shareable(config: Any) -> dict[str, Any]:
    """The settings of a dataclass without servers, and with the names of local files and folders in place of their
    paths: for trackers, cards and tables of scores."""
    return {name: shareable_value(value) for name, value in asdict(config).items() if name not in MACHINE}


def shareable_value(value: Any) -> Any:
    """A setting without servers, which are left out of dicts and lists and are `None` alone, and without paths."""
    if isinstance(value, dict):
        shared = {}
        for key, item in value.items():
            called_server = isinstance(item, str) and _SERVER_NAME.fullmatch(str(key))
            if not called_server and not _names_server(key) and not _names_server(item):
                name = unique = shareable_value(key)
                number = 1
                while unique in shared:  # two folders of one name
                    number += 1
                    unique = f"{name} ({number})"
                shared[unique] = shareable_value(item)
        return shared
    if isinstance(value, (list, tuple)):
        return [shareable_value(item) for item in value if not _names_server(item)]
    if isinstance(value, str):
        return None if _names_server(value) else shareable_name(value)
    return value


def shareable_name(text: str) -> str:
    """A Hub id or any other text as it is, and of a local path the name."""
    # Not `Path.exists`, which raises an error for what is no possible name.
    if os.path.isabs(text) or os.path.exists(text):
        return Path(text).name
    return _PATH.sub(lambda match: Path(match[0]).name, text)


def _names_server(value: Any) -> bool:
    return isinstance(value, str) and _SERVER.search(value) is not None
