"""Names that are imported when first asked for (PEP 562): those of our packages, and of our classes in diffusers."""

import importlib
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any


# Modules of classes that diffusers gets when it is asked for them, by name.
_ANNOUNCED: dict[str, str] = {}


def lazy_names(
    package: str, modules: dict[str, list[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package, of names by the module, `.module` of it, that has them."""
    module_of = {name: module for module, names in modules.items() for name in names}

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(module_of[name], package), name)

    return get, lambda: sorted({*vars(sys.modules[package]), *module_of}), sorted(module_of)


def register_with_diffusers(cls: type):
    """Makes a class an attribute of diffusers, among which it looks for what model_index.json and config.json name;
    an `ImportError` if there is a class of another module by that name."""
    import diffusers

    _check_is_free(diffusers, cls.__name__, cls.__module__)
    setattr(diffusers, cls.__name__, cls)


def announce_to_diffusers(modules: dict[str, str]):
    """Registers classes, names and modules, without importing anything: neither them, before diffusers is asked for
    one, nor diffusers, which takes seconds; if it is not there yet, they are registered when it is imported."""
    _ANNOUNCED.update(modules)
    if "diffusers" in sys.modules:
        _extend(sys.modules["diffusers"])
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


def _check_is_free(diffusers: ModuleType, name: str, module: str):
    existing = getattr(diffusers, name, None)
    if existing is not None and existing.__module__ != module:
        raise ImportError(f"{name} is {existing.__module__}'s name already, which {module} cannot have.")


def _extend(diffusers: ModuleType):
    for name, module in _ANNOUNCED.items():
        _check_is_free(diffusers, name, module)
    # Python asks it before the method of diffusers' own class of module, which imports its names in the same way.
    diffusers.__getattr__ = _get_announced


def _get_announced(name: str) -> type:
    if name not in _ANNOUNCED:
        raise AttributeError(name)
    return getattr(importlib.import_module(_ANNOUNCED[name]), name)


class _WhenImported(MetaPathFinder):
    """Finds diffusers where the other finders do, and extends it once it has been executed."""

    def find_spec(self, name, path=None, target=None):
        if name != "diffusers":
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType):
                execute(module)
                _extend(sys.modules[name])  # it puts another object there

            spec.loader.exec_module = exec_module
        return spec
