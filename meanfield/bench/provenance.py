"""What made a result: the command line, what the whole library says, the versions that it stood on."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import meanfield

NUMERICAL = ("torch", "numpy", "scipy", "cvxpy", "clarabel", "POT", "scikit-learn")  # what figures come from
PACKAGES = (*NUMERICAL, "matplotlib", "safetensors")
SOURCES = (".py", ".html")


def digest(paths: Iterable[Path]) -> str:
    """Of the contents of files, in the order given."""
    found = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        found.update(len(content).to_bytes(8, "big") + content)
    return found.hexdigest()[:16]


def sources(directory: Path) -> list[Path]:
    """All code below a directory, in the order of the paths below it."""
    return sorted(path for path in directory.rglob("*") if path.suffix in SOURCES)


def library(*others: str) -> str:
    """The digest of the whole library, and of other packages after it: a kept result counts as long as this stays."""
    return "-".join(map(package, ("meanfield", *others)))


@cache
def package(module: str) -> str:
    """The digest of all code of the package that a module belongs to, or of its file where it belongs to none.

    A module that lies elsewhere, as in a folder that was added to a package's path, brings the code of its own folder.
    """
    top, own = sys.modules[module.split(".")[0]], Path(str(sys.modules[module].__file__)).absolute()
    homes = [Path(each).absolute() for each in getattr(top, "__path__", ())]
    if homes and module != top.__name__ and not any(own.is_relative_to(home) for home in homes):
        homes.append(own.parent)
    found = [sources(home) for home in homes] or [[own]]
    return digest(path for each in found for path in each)


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    own = {"meanfield": meanfield.__version__, "python": platform.python_version()}
    return {**own, **{package: _version(package) for package in packages}}


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@dataclass(frozen=True)
class Provenance:
    """What every page, JSON file and table says of itself.

    command: the whole command line, quoted for a shell.  settings: every setting of it, defaults as well.  data: which
    images were read, and how; empty without any.
    """

    command: str
    settings: dict[str, Any]
    library: str = field(default_factory=library)
    versions: dict[str, str] = field(default_factory=versions)
    data: str = ""

    def lines(self) -> list[str]:
        """For a page's footer or the head of a table."""
        used = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        read = [f"Data: {self.data}"] if self.data else []
        return [f"Made by: {self.command}", *read, f"Library: {self.library}; {used}"]
