"""What a name that is not known may be a slip of."""

import difflib
from collections.abc import Iterable


def close_matches(name: str, names: Iterable[str]) -> str:
    """The names that `name` may be a slip of, as a remark to put behind it; empty if there is none."""
    matches = difflib.get_close_matches(name, list(names), n=3)
    return f" (did you mean {' or '.join(matches)}?)" if matches else ""
