"""The runs published with Astrolabe, by name; and runs of ours, most of the other published models.

A name is `<base>_video_<variant>[_<N>gpu]`; without a number it is the run on 8 processes. What each is, is data: a
YAML file a base in `recipes/published/`, `common.yaml` for what all share, and `recommended.yaml` for what we
would change. Together they state everything that decides what is trained: defaults of ours do not. `recommended/` has
what our own are, besides.
"""

import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError, close_matches
from ..layouts.published_models import PUBLISHED_MODELS
from .config import AUTO


RECIPES = Path(__file__).parents[1] / "recipes"
PUBLISHED = RECIPES / "published"
RECOMMENDED = RECIPES / "recommended" / "runs.yaml"
DEFAULT_PROCESSES = 8
# Files beside those of the bases.
SHARED = ("common", "recommended")
SIZES = ("train_batch_size", "samples_per_prompt", "batches_per_epoch")
# Spellings that the published files and their README do not agree on.
_SPELLINGS = (("casual_forcing", "causal_forcing"), ("multireward", "multi_reward"))


@dataclass
class PublishedRun:
    """A published run: its settings as released, what we would change of them, and how many processes they are for. Or
    one of ours, which was not published and of which nothing is to be changed."""

    name: str
    settings: dict[str, Any]
    recommended: dict[str, Any]
    processes: int
    sizes: dict[int, dict[str, Any]]  # of its base, by number of processes
    kind: str = "published"  # or "recommended"

    def settings_for(self, num_processes: int, given: dict[str, int]) -> tuple[dict[str, Any], str]:
        """The settings for a number of processes, and a line that says where batch and group sizes come from.

        They are the published ones of the same base if there are some for that number. Otherwise, and beside a size
        of `SIZES` that is `given` by the user and stays, the batches are as many as come nearest to the published
        samples an epoch and make up whole groups. A `train_batch_size` of `auto` counts batches as videos.
        """
        auto = given.get("train_batch_size") == AUTO
        if auto:
            given = given | {"train_batch_size": 1}
        source = num_processes if num_processes in self.sizes else self.processes
        published = {name: self.sizes[source][name] for name in SIZES}
        sizes = published | given
        if sizes == published and source == num_processes:
            origin = f"as {self.kind}" if source == self.processes else f"those {self.kind} for {source} processes"
        elif "batches_per_epoch" in given:
            origin = "as given"
        else:
            together = num_processes * sizes["train_batch_size"]
            unit = sizes["samples_per_prompt"] // math.gcd(sizes["samples_per_prompt"], together)
            total = source * published["train_batch_size"] * published["batches_per_epoch"]
            sizes["batches_per_epoch"] = unit * max(1, round(total / together / unit))
            origin = f"near to those {self.kind} for {source} processes"
        batch, group, batches = sizes.values()
        samples = num_processes * batch * batches
        return self.settings | sizes, (
            f"{self.name} on {num_processes} process{'es' if num_processes > 1 else ''}: batches "
            f"{'as large as fit' if auto else f'of {batch}'}, groups of {group}, {samples} samples an epoch, {origin}"
        )

    def choose(self, recommended: bool, given: list[str]) -> tuple[dict[str, Any], str]:
        """What is to be changed of the settings, nothing unless `recommended`, and a line that says whose they are.
        Fields that are `given` by the user go before either."""
        changed = {k: v for k, v in self.recommended.items() if v != self.settings.get(k, v) and k not in given}
        if self.kind == "recommended":
            line = "as we recommend; no such run was published"
        elif recommended:
            line = f"with what we recommend: {', '.join(f'{name}={value}' for name, value in changed.items())}"
        else:
            line = "as released; --recommended is what we would change (docs/published_runs.md)"
        own = [name for name in given if name in self.settings]
        return changed if recommended else {}, line + (f"; but for your {', '.join(own)}" if own else "")


@cache
def _read(name: str) -> dict[str, Any]:
    return yaml.safe_load((PUBLISHED / f"{name}.yaml").read_text())


@cache
def _read_recommended() -> dict[str, Any]:
    return yaml.safe_load(RECOMMENDED.read_text())


@cache
def published_names() -> dict[str, tuple[str, str, int]]:
    """Base, variant and number of processes of every name, in the files' spelling."""
    names = {}
    for path in sorted(PUBLISHED.glob("*.yaml")):
        if path.stem not in SHARED:
            data = _read(path.stem)
            for variant, settings in data["variants"].items():
                for number in settings.get("published_on", data["processes"]):
                    names[_name(path.stem, variant, number)] = path.stem, variant, number
    return names


@cache
def recommended_names() -> dict[str, tuple[str, str, int]]:
    """Of every name of ours the published model, variant and number of processes."""
    data = _read_recommended()
    ran = {_read(base)["settings"]["model"] for base, _, _ in published_names().values()}
    others = [model for model, recipe in PUBLISHED_MODELS.items() if model not in ran and recipe.size == "1.3B"]
    return {
        _name(model.replace("-", "_"), variant, number): (model, variant, number)
        for model in PUBLISHED_MODELS
        for variant, settings in data["variants"].items()
        if model in settings.get("models", others)
        for number in settings.get("processes", data["processes"])
    }


def _name(base: str, variant: str, processes: int) -> str:
    return f"{base}_video_{variant}" + ("" if processes == DEFAULT_PROCESSES else f"_{processes}gpu")


def find_published_run(name: str) -> PublishedRun | None:
    """The run of this name, published in any spelling or ours; `None` if it does not have the form of one, a
    [`UserError`] if it has and there is none."""
    spelled = name
    for other, ours in _SPELLINGS:
        spelled = spelled.replace(other, ours)
    if not re.fullmatch(r"\w+_video_\w+", spelled):
        return None
    # The number of the default may be spelled out.
    known, key = published_names(), spelled.removesuffix(f"_{DEFAULT_PROCESSES}gpu")
    if key in recommended_names():
        return _recommended_run(key)
    if key not in known:
        near = close_matches(spelled, [*known, *recommended_names()]) or "; --config list prints the names"
        raise UserError(f"--config {name}: no published run has this name{near}.")
    base, variant, processes = known[key]
    data = _read(base)
    settings = _read("common") | data["settings"] | data["processes"][processes] | data["variants"][variant]
    settings |= data.get("runs", {}).get(key.removeprefix(f"{base}_video_"), {})
    settings.pop("published_on", None)
    return PublishedRun(name, settings, _read("recommended"), processes, data["processes"])


def _recommended_run(name: str) -> PublishedRun:
    (model, variant, processes), data = recommended_names()[name], _read_recommended()
    own = data["variants"][variant]
    settings = _read("common") | _read("recommended") | {"model": model} | data["settings"]
    sizes = own.get("processes", data["processes"])
    settings |= sizes[processes] | {field: own[field] for field in own if field not in ("models", "processes")}
    return PublishedRun(name, settings, {}, processes, sizes, kind="recommended")
