"""The pages of the API: every name of `meanfield.__all__`, and of the modules named there every public name.

Public is what `__all__` names, and in a module without it what is defined there without an underscore.  The pages are
written when the site is built; nothing has to be entered for a new name.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

import meanfield

BESIDES = ("meanfield.ranks", "meanfield.storage", "meanfield.studies.widths.parameterisation", "theory_checks")


def public(module: ModuleType) -> list[str]:
    """Names of a module, submodules among them."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    if hasattr(module, "__path__"):
        return [each.name for each in pkgutil.iter_modules(module.__path__) if not each.ispkg]
    own = lambda found: getattr(found, "__module__", None) == module.__name__ and callable(found)  # noqa: E731
    return [name for name, found in vars(module).items() if not name.startswith("_") and own(found)]


def modules() -> list[ModuleType]:
    """The package, its public modules, those that these name, and those that tutorials import besides."""
    found = [meanfield, *map(importlib.import_module, BESIDES)]
    for module in found:
        found += [each for name in public(module) if isinstance(each := member(module, name), ModuleType)]
    return found


def member(module: ModuleType, name: str) -> Any:
    """A name of a module; a submodule is imported."""
    try:
        return getattr(module, name)
    except AttributeError:
        return importlib.import_module(f"{module.__name__}.{name}")


def page(module: ModuleType) -> str:
    """The page of a module: its docstring, then its names."""
    title = module.__name__
    lines = [title, "=" * len(title), "", f".. automodule:: {title}", "   :no-members:", ""]
    below = [each.__name__ for name in public(module) if isinstance(each := member(module, name), ModuleType)]
    below += [*BESIDES] if module is meanfield else []
    if below:
        lines += [".. toctree::", "   :maxdepth: 1", "", *(f"   {each}" for each in below), ""]
    for name in public(module):
        lines += _entry(module, name, member(module, name))
    return "\n".join(lines)


def _entry(module: ModuleType, name: str, found: Any) -> list[str]:
    full = f"{module.__name__}.{name}"
    if isinstance(found, ModuleType):
        return []
    if inspect.isclass(found):
        second = ["   :no-index:"] if module is not meanfield and getattr(meanfield, name, None) is found else []
        return [f".. autoclass:: {full}", "   :members:", "   :exclude-members: extra_repr", *second, ""]
    if callable(found):
        return [f".. autofunction:: {full}", ""]
    return [f".. py:data:: {full}", f"   :value: {found!r}", ""]


def write(app: Any) -> None:
    """For `builder-inited`: a page per module; files that have not changed keep their dates."""
    directory = Path(app.srcdir) / "api"
    directory.mkdir(exist_ok=True)
    for module in modules():
        name = "index" if module is meanfield else module.__name__
        text = page(module) if module is not meanfield else page(module).replace("meanfield\n=========", "API\n===", 1)
        path = directory / f"{name}.rst"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
