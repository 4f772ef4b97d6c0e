"""Options that the benchmarks share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from meanfield.bench.options import OUTPUT, WORK, Overwrite, Quiet, Settings, flag, option, path
from meanfield.validation import Misuse

Quick = Annotated[bool, flag("Little of everything, to see that it runs.", WORK)]
InProcess = Annotated[bool, flag("Run everything in this process: quicker, but peak memory then means little.", WORK)]


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions(Settings):
    """What every benchmark can be asked for."""

    out: Annotated[
        Path | None,
        option(
            "Write the figures as JSON, and a picture beside them where there is one: to FILE.json, or into a "
            "directory under the benchmark's name.",
            OUTPUT,
        ),
        path,
    ] = None
    overwrite: Overwrite = False
    quiet: Quiet = False


def not_both(quick: bool, large: bool) -> None:
    """Raises Misuse."""
    if quick and large:
        raise Misuse("large", large, "does not go with --quick; leave one of them out")
