"""The command line: a command for every study, found in its folder; heavy imports wait until one is asked for."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Sequence

from cyclopts import App

from meanfield import studies
from meanfield.bench import command

TEXT = "Continuous-limit CNNs: infinitely wide networks as particles, and the convex program that certifies them."


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point of the installed command."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    command.main(_application(words[:1]), words)


def _application(asked: Sequence[str]) -> App:
    """All commands by name, with the code behind the one that is asked for."""
    app = command.application("meanfield", TEXT)
    for name in sorted(each.name for each in pkgutil.iter_modules(studies.__path__) if each.ispkg):
        package = importlib.import_module(f"{studies.__name__}.{name}")
        called = getattr(package, "COMMAND", name)
        command.register(app, called, package, complete=[called] == list(asked))
    return app


if __name__ == "__main__":
    main()
