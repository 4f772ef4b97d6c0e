"""A benchmark run from its command: figures measured, shown as tables, and written with what made them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks import PROGRAM, machine
from benchmarks.options import BenchmarkOptions
from meanfield.bench.command import writable
from meanfield.bench.provenance import PACKAGES, Provenance, library, versions
from meanfield.pages.plotting import png
from meanfield.storage import to_json, write_atomically
from meanfield.validation import Misuse

PIPED_WIDTH = 160  # columns, where the output is no terminal
PEERS = ("scs", "pyscnn")
Found = dict[str, Any]  # the figures of a benchmark, ready for JSON
Report = Callable[[str], None]  # takes a line of progress


def run_benchmark(
    name: str,
    options: BenchmarkOptions,
    run: Callable[[Any, Report], Found],
    tables: Callable[[Found], Sequence[Table]],
    picture: Callable[[Found], Figure] | None = None,
) -> None:
    """Measure, show the tables, and write JSON and picture where the options say.

    run(options, report): the figures.  tables, picture: of the figures with what made them and the machine.
    """
    target = None if options.out is None else destination(options.out, name)
    said, shown = (_console(file, options.quiet) for file in (sys.stderr, sys.stdout))
    command = options.command_line(*shlex.split(PROGRAM), name)
    made = Provenance(command, options.to_dict(), library("benchmarks"), versions((*PACKAGES, *PEERS)))
    frame = {"benchmark": name, "made": asdict(made), "machine": machine.description()}
    found = frame | run(options, lambda line: _plainly(said, line))
    for table in tables(found):
        shown.print(table)
    if target is not None:
        for written in write(found, target, picture):
            _plainly(shown, f"written: {written}")


def destination(out: Path, name: str) -> Path:
    """The JSON file that `out` means: FILE.json or a directory, which is made; Misuse where it cannot be written."""
    target = out if out.suffix == ".json" and not out.is_dir() else out / f"{name}.json"
    writable(target.parent)
    if target.is_dir():
        raise Misuse("out", str(out), f"cannot be used: {target} is a directory; give another one")
    return target


def write(found: Found, target: Path, picture: Callable[[Found], Figure] | None) -> list[Path]:
    """Write the JSON, and the picture beside it."""
    written = [write_atomically(target, to_json(found))]
    if picture is not None:
        written.append(write_atomically(target.with_suffix(".png"), png(picture(found))))
    return written


def _console(file: Any, quiet: bool) -> Console:
    return Console(file=file, quiet=quiet, width=None if file.isatty() else PIPED_WIDTH)


def _plainly(console: Console, line: str) -> None:
    """Square brackets and all."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)
