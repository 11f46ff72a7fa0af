"""Imports inside the package run one way. What is read is the source: imports inside functions count too."""

import ast
from importlib.util import resolve_name
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "astrolabe_diffusers"
# A module may import from its own layer and from those before it. CONTRIBUTING.md says what belongs where.
LAYERS = (
    ("errors", "shareable", "config", "registration"),
    ("files",),
    ("serving",),
    ("distributed",),
    ("layouts",),
    ("models",),
    ("pipelines",),
    ("conversion",),
    ("rewards",),
    ("rollout",),
    ("reporting",),
    ("generation",),
    ("evaluation",),
    ("live",),
    ("training",),
    ("cli",),
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}


def imports(path: Path, root: Path = PACKAGE) -> set[str]:
    """The modules of the package that a file imports, by their names below it; values of a module are its own."""
    package = ".".join((root.name, *path.relative_to(root).parent.parts))
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    below = {name.removeprefix(f"{root.name}.") for name in names if name.startswith(f"{root.name}.")}
    return {name for name in below if source(name, root)}


def source(name: str, root: Path = PACKAGE) -> Path | None:
    path = root / name.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def modules(root: Path = PACKAGE) -> dict[str, Path]:
    """Files by the names of their modules, but for the package's own `__init__.py`, which gathers names for users."""
    paths = (path for path in root.rglob("*.py") if path != root / "__init__.py")
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def against_the_order(root: Path = PACKAGE) -> list[str]:
    return [
        f"{name} imports {other}"
        for name, path in modules(root).items()
        for other in sorted(imports(path, root))
        if LAYER[other.split(".")[0]] > LAYER[name.split(".")[0]]
    ]


def test_every_module_has_a_place():
    assert {name.split(".")[0] for name in modules()} <= LAYER.keys()


def test_imports_run_one_way():
    assert against_the_order() == []


@pytest.mark.parametrize(
    "line",
    [
        "from ..training.trainer import NFTTrainer",
        "from .. import training",
        "import astrolabe_diffusers.training.trainer",
        "def f():\n    from ..training import trainer",
    ],
)
def test_an_import_against_the_order_is_seen(tmp_path, line):
    for name in ("generation/run", "training/__init__", "training/trainer"):
        (tmp_path / PACKAGE.name / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / PACKAGE.name / f"{name}.py").write_text(line if name == "generation/run" else "")
    assert against_the_order(tmp_path / PACKAGE.name)[0].startswith("generation.run imports training")


@pytest.mark.parametrize("start", ["generation", "evaluation.score_files", "reporting"])
def test_what_needs_no_trainer_loads_none(start):
    """Directly or by way of others."""
    reached, found = set(), {name for name in modules() if f"{name}.".startswith(f"{start}.")}
    assert found
    while found:
        reached |= found
        found = set().union(*(imports(source(name)) for name in found)) - reached
    assert len(reached) > 5 and not {name for name in reached if name.split(".")[0] == "training"}
