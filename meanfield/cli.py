"""The command line: a command for every study, found in its folder."""

from __future__ import annotations

from collections.abc import Sequence

from meanfield import studies
from meanfield.bench.command import launch

TEXT = "Continuous-limit CNNs: infinitely wide networks as particles, and the convex program that certifies them."


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point of the installed command."""
    launch("meanfield", TEXT, studies, arguments)


if __name__ == "__main__":
    main()
