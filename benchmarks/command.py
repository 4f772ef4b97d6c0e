"""A benchmark run from its command: figures measured, shown as tables, and written with what made them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks import PROGRAM, machine
from benchmarks.options import BenchmarkOptions
from meanfield.bench import signals
from meanfield.bench.provenance import PACKAGES, Provenance, library, versions
from meanfield.pages.plotting import png
from meanfield.storage import to_json
from meanfield.storage.results import Result, opened

PIPED_WIDTH = 160  # columns, where the output is no terminal
PEERS = ("scs", "pyscnn", "loss-landscapes")
Found = dict[str, Any]  # the figures of a benchmark, ready for JSON
Report = Callable[[str], None]  # takes a line of progress


def run_benchmark(
    name: str,
    options: BenchmarkOptions,
    run: Callable[[Any, Report], Found],
    tables: Callable[[Found], Sequence[Table]],
    picture: Callable[[Found], Figure] | None = None,
) -> Found:
    """Measure, show the tables, and write JSON and picture where the options say; the figures, as they are written.

    run(options, report): the figures.  tables, picture: of the figures with what made them and the machine.
    """
    said, shown = (_console(file, options.quiet) for file in (sys.stderr, sys.stdout))
    command = options.command_line(*shlex.split(PROGRAM), name)
    made = Provenance(command, options.to_dict(), library("benchmarks"), versions((*PACKAGES, *PEERS)))
    frame = {"benchmark": name, "made": asdict(made), "machine": machine.description()}
    with destination(options.out, name, overwrite=options.overwrite) as target:
        found = frame | run(options, lambda line: _plainly(said, line))
        for table in tables(found):
            shown.print(table)
        if target is not None:
            contents = files(found, target.name, picture)
            with signals.held():
                target.publish(contents)
            for file in contents:
                _plainly(shown, f"written: {target.directory / file}")
    return found


def destination(out: Path | None, name: str, *, overwrite: bool = False) -> AbstractContextManager[Result | None]:
    """The result that `out` means: FILE.json or a directory, which is made; Misuse where it cannot be written."""
    if out is None:
        return nullcontext()
    if out.suffix == ".json" and not out.is_dir():
        out, name = out.parent, out.stem
    return opened(out, name, (f"{name}.json", f"{name}.png"), overwrite=overwrite)


def files(found: Found, name: str, picture: Callable[[Found], Figure] | None) -> dict[str, bytes | str]:
    """The JSON, and the picture beside it."""
    drawn = {} if picture is None else {f"{name}.png": png(picture(found))}
    return {f"{name}.json": to_json(found), **drawn}


def _console(file: Any, quiet: bool) -> Console:
    return Console(file=file, quiet=quiet, width=None if file.isatty() else PIPED_WIDTH)


def _plainly(console: Console, line: str) -> None:
    """Square brackets and all."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)
