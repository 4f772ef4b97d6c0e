"""`python -m theory_checks`: every claim with its negative controls; exits with 1 where one fails."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from rich.console import Console

from meanfield.bench import command, signals
from meanfield.bench.options import (
    OUTPUT,
    WORK,
    Device,
    Jobs,
    Out,
    Overwrite,
    Quiet,
    Seed,
    Settings,
    at_least,
    flag,
    option,
)

if TYPE_CHECKING:
    from meanfield.storage.results import Result
    from theory_checks.claim import Claim
    from theory_checks.runner import Record

PROGRAM = ("python", "-m", "theory_checks")
FAILED = 1  # exit code
KEPT = ("cells", "witnesses")  # folders of --out
PIPED_WIDTH = 160  # columns, where the output is no terminal


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    only: Annotated[
        tuple[str, ...],
        option("Only this claim or family of claims; may be given again. Without it: all.", WORK, show_default=False),
    ] = ()
    full: Annotated[
        bool,
        flag(
            "Many instances and seeds (under 25 minutes on 2 cores), or, as by default, under 2 minutes.",
            WORK,
            "--quick",
        ),
    ] = False
    seed: Seed = 0
    seeds: Annotated[
        int, option("Run that many seeds, from --seed on; no verdict should change.", WORK), at_least(1)
    ] = 1
    device: Device = "cpu"
    jobs: Jobs = 2
    out: Out = None
    overwrite: Overwrite = False
    list: Annotated[bool, flag("Name the claims and stop.", OUTPUT)] = False
    quiet: Quiet = False


def check(options: Options) -> None:
    """Measure every claim of the theory, and its negative controls, which must come out the other way.

    A claim whose control passes counts as failed. The exit code is 1 where anything fails, 2 where an option is wrong.

    With --out there are index.html, results.json, a picture of every claim and the witnesses of its controls, and
    verdicts are kept: after a stop of any kind the same command goes on. Without it nothing is written.
    """
    with signals.imports():
        from theory_checks.catalogue import claims
    console, chosen = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH), claims(options.only)
    if options.list:
        for claim in chosen:
            console.print(f"[bold]{claim.name}[/]  {claim.statement}", soft_wrap=True)  # one line each
        return
    with _result(chosen, options) as result:
        try:
            with signals.surely():
                records = _measure(chosen, options)
                _tell(console, records, options)
                if result is not None:
                    _write(chosen, records, result, options)
        except KeyboardInterrupt:
            command.interrupted(options.out, KEPT)
    if not all(record["passed"] for record in records):
        raise SystemExit(FAILED)


def _result(chosen: Sequence[Claim], options: Options) -> AbstractContextManager[Result | None]:
    from meanfield.storage.results import opened
    from theory_checks import page

    if options.out is None:
        return nullcontext()
    names = page.names([claim.name for claim in chosen])
    return opened(options.out, "theory_checks", names, KEPT, overwrite=options.overwrite)


def _measure(chosen: Sequence[Claim], options: Options) -> list[Record]:
    from theory_checks import runner

    seeds = range(options.seed, options.seed + options.seeds)
    cells = runner.cells([claim.name for claim in chosen], seeds, options.full, options.device)
    with command.counted(len(cells), options.quiet) as announce:
        return runner.run(cells, options.out, options.jobs, lambda cell, kept: announce(cell["claim"], kept))


def _tell(console: Console, records: Sequence[Record], options: Options) -> None:
    from theory_checks import page

    if not options.quiet:
        console.print(page.table(records))
    for line in page.failures(records):
        console.print(line, style="bold red", markup=False)


def _write(chosen: Sequence[Claim], records: Sequence[Record], result: Result, options: Options) -> None:
    from meanfield.bench.provenance import Provenance, library
    from theory_checks import page

    made = Provenance(options.command_line(*PROGRAM), options.to_dict(), library("theory_checks"))
    files = page.files(records, made, {claim.name: claim.axes for claim in chosen})
    with signals.held():
        result.publish(files)
    print(f"page: {result.directory / page.PAGE}")


def main(arguments: Sequence[str] | None = None) -> None:
    command.main(command.single(" ".join(PROGRAM), check), arguments)


if __name__ == "__main__":
    main()
