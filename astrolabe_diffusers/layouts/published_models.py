"""How published models were trained, hence how they generate: what conversion writes into their configs.

Each is a YAML file, in `recipes/models/` or a user's own, with the fields of [`PublishedModel`].
"""

from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..config import read_yaml
from ..errors import UserError, close_matches
from ..files.text import read_text


MODELS = Path(__file__).parents[1] / "recipes" / "models"
_SIZES = ("1.3B", "14B")


@dataclass(frozen=True)
class PublishedModel:
    """What a recipe says.

    Args:
        source: where the weights are published.
        weights: entries of a training checkpoint with the generator, the one its authors load first; none if the
            file's tensors have no entries.
        transformer: its config, beside the base model's sizes.
        pipeline: its config.
        size: of the Wan2.1 model it was trained from, or "14B".
        experts: transformers in the file, of that size each; the second one writes the cache.
    """

    source: str
    weights: tuple[str, ...] = ()
    transformer: dict[str, Any] = field(default_factory=dict)
    pipeline: dict[str, Any] = field(default_factory=dict)
    size: str = _SIZES[0]
    experts: int = 1

    def check_names(self, part: str, known: Collection[str]):
        """Raises a `ValueError` if `part`, `"transformer"` or `"pipeline"`, has a name that is not `known`."""
        for name in getattr(self, part).keys() - set(known):
            near = close_matches(name, known) or f"; it has {', '.join(sorted(known))}"
            raise ValueError(f"the recipe's {part} has no `{name}`{near}.")


def read_published_model(path: Path) -> PublishedModel:
    """The recipe in a YAML file; a `ValueError` if it is none, an `OSError` if it cannot be read."""
    try:
        values = read_yaml(f"{path} is no valid YAML", read_text(path))
    except UserError as error:
        raise ValueError(str(error)) from error
    names = [f.name for f in fields(PublishedModel)]
    if not isinstance(values, dict) or not isinstance(values.get("source"), str):
        raise ValueError(f"{path} is no recipe: it must say its source, and may say {', '.join(names[1:])}.")
    for name, value in values.items():
        if name not in names:
            near = close_matches(str(name), names) or f"; it has {', '.join(names)}"
            raise ValueError(f"{path}: a recipe has no {name}{near}.")
        kind = {"weights": list, "transformer": dict, "pipeline": dict, "experts": int}.get(name, str)
        if not isinstance(value, kind):
            words = {list: "a list of names", dict: "a mapping of names to values", str: "text", int: "a number"}
            raise ValueError(f"{path}: {name} must be {words[kind]}, not {value!r}.")
    if values.get("size", _SIZES[0]) not in _SIZES:
        raise ValueError(f"{path}: size must be one of {', '.join(_SIZES)}, not {values['size']!r}.")
    if values.get("experts", 1) not in (1, 2):
        raise ValueError(f"{path}: experts must be 1 or 2, not {values['experts']!r}.")
    return PublishedModel(**values | {"weights": tuple(values.get("weights", ()))})


PUBLISHED_MODELS = dict(sorted((path.stem, read_published_model(path)) for path in MODELS.glob("*.yaml")))


def find_published_model(name: str) -> PublishedModel:
    """The model of [`PUBLISHED_MODELS`] by that name, or of the YAML file that it is; a `ValueError` if there is
    none."""
    if Path(name).suffix in (".yaml", ".yml"):
        return read_published_model(Path(name))
    if name not in PUBLISHED_MODELS:
        raise ValueError(
            f"there is no published model {name!r}{close_matches(name, PUBLISHED_MODELS)}; there are "
            f"{', '.join(PUBLISHED_MODELS)}, or a YAML file of your own."
        )
    return PUBLISHED_MODELS[name]
