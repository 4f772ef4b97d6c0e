"""`python -m theory_checks`: every claim with its negative controls; exits with 1 where one fails."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PIPED_WIDTH = 160  # columns, where the output is no terminal

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.command()
def main(
    only: Annotated[list[str] | None, typer.Option(help="a claim or a family of claims; may be given again")] = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full/--quick", help="many instances and seeds (under 25 minutes on 2 cores), or under 2 minutes"
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="seed of everything that is drawn")] = 0,
    seeds: Annotated[
        int, typer.Option(min=1, help="run that many seeds, from --seed on; no verdict should change")
    ] = 1,
    device: Annotated[str, typer.Option(help="where networks live: cpu, cuda, cuda:1, ...")] = "cpu",
    jobs: Annotated[int, typer.Option(min=1, help="claims measured at a time, one thread each")] = 2,
    out: Annotated[
        Path | None, typer.Option(help="directory for index.html, results.json, a PNG per claim, and witnesses")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="keep the verdicts that --out holds already, made by the same code")
    ] = False,
    catalogue: Annotated[bool, typer.Option("--list", help="name the claims and stop")] = False,
) -> None:
    """Measure every claim of the theory, and its negative controls, which must come out the other way.

    A claim whose control passes counts as failed. The exit status is 1 where anything fails, 2 where an option is
    wrong.
    """
    from theory_checks.catalogue import claims
    from theory_checks.claim import Setting

    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
    if resume and out is None:
        raise typer.BadParameter("needs --out, the directory to take verdicts from", param_hint="--resume")
    _check_device(device)
    try:
        chosen = claims(only or ())
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--only") from error
    if catalogue:
        for claim in chosen:
            console.print(f"[bold]{claim.name}[/]  {claim.statement}")
        return
    tasks = [(claim.name, Setting(each, full, device)) for each in range(seed, seed + seeds) for claim in chosen]
    records = _measure(tasks, out, jobs, resume)
    order = {claim.name: place for place, claim in enumerate(chosen)}
    records.sort(key=lambda record: (order[record["name"]], record["seed"]))
    _tell(console, records, out)
    raise typer.Exit(0 if all(record["passed"] for record in records) else 1)


def _check_device(device: str) -> None:
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(
            f"{device!r} cannot be used: {str(error).splitlines()[0]}", param_hint="--device"
        ) from error


def _measure(tasks: list[Any], out: Path | None, jobs: int, resume: bool) -> list[dict[str, Any]]:
    from theory_checks import runner

    if out is not None:
        (out / "verdicts").mkdir(parents=True, exist_ok=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    records = []
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("measuring", total=len(tasks))
        for record in runner.run(tasks, out, jobs, resume):
            records.append(record)
            progress.update(bar, advance=1, description=record["name"])
    return records


def _tell(console: Console, records: list[dict[str, Any]], out: Path | None) -> None:
    from theory_checks import page

    console.print(page.table(records))
    for line in page.failures(records):
        console.print(line, style="bold red", markup=False)
    if out is not None:
        _write(records, out)
        console.print(f"The page is {(out / 'index.html').resolve()}: open it in a browser.")


def _write(records: list[dict[str, Any]], out: Path) -> None:
    from meanfield.pages.html import to_json
    from meanfield.storage import write_atomically
    from theory_checks import catalogue, page, pictures

    images = {}
    for name, group in page.grouped(records).items():
        if group[0]["evidence"]:
            write_atomically(out / f"{name}.png", pictures.picture(group[0], catalogue.claim(name).axes))
            images[name] = f"{name}.png"
    write_atomically(out / "results.json", to_json({"records": records}))
    command = shlex.join(["python", "-m", "theory_checks", *sys.argv[1:]])
    write_atomically(out / "index.html", page.html(records, images, command))


if __name__ == "__main__":
    app()
