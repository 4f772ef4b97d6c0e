"""The command line: `meanfield solve` trains a continuous CNN and writes a report; `widths` and `graft` are studies of
ordinary networks.

Heavy imports wait inside the commands.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from meanfield.bench.sweep import Cell, Tables
    from meanfield.data import Dataset
    from meanfield.problem import Problem
    from meanfield.studies.solve.measure import Run

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Continuous-limit CNNs: infinitely wide networks as particles, and the convex program that certifies them.",
)
DATA, MODEL, OBJECTIVE, WORK, OUTPUT = "Data", "Network", "Objective", "Work", "Output"
INTERRUPTED, MISUSE = 130, 2
CIFAR_TRAINING = 50_000  # the first images of either data set; the test images follow
ARGUMENTS = re.compile(
    r"(?<![\w-])(data|classes|samples|pool|widths|activation|kernel_size|stride|pooling|readout|loss|source|input|readout_penalty|source_penalty|input_penalty"
    r"|kernel_norm|amplitude_bound|input_bound|seed|part|size|jobs|backend|grow|rounds|flow_steps|tolerance|max_seconds|dtype|device|out"
    r"|network|width|penalty|strength)=('?)"
)


class Misuse(Exception):
    """Bad input, told in one line."""


def main() -> None:
    """The entry point of the installed command."""
    app(prog_name="meanfield")


def _version(wanted: bool) -> None:
    if wanted:
        from meanfield import __version__

        typer.echo(f"meanfield {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


def option(text: str, panel: str, metavar: str | None = None, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, metavar=metavar, show_default=False)


@app.command()
def solve(
    context: typer.Context,
    data: Annotated[
        str,
        option(
            "Images to learn: digits (8x8, inside scikit-learn), mnist (28x28, needs the extra meanfield[data]) or a "
            "FILE.npz with images under inputs, x or images and integer labels under targets, y or labels. Default: "
            "digits.",
            DATA,
            "NAME|FILE",
        ),
    ] = "digits",
    classes: Annotated[
        str,
        option(
            "Which classes to tell apart, separated by commas, or all. With two classes the first one is +1. Default: "
            "3,5.",
            DATA,
            "LIST",
        ),
    ] = "3,5",
    samples: Annotated[
        int,
        option(
            "How many images to train on, the first ones in file order; the rest is held out. Default: 16.", DATA, "N"
        ),
    ] = 16,
    pool: Annotated[
        int,
        option(
            "Average images over windows of N x N pixels first; 1 leaves them as they are. Default: 2 (digits become "
            "4x4).",
            DATA,
            "N",
        ),
    ] = 2,
    widths: Annotated[
        str,
        option("Particles per layer, separated by commas; as many layers as numbers. Default: 64,32.", MODEL, "LIST"),
    ] = "64,32",
    activation: Annotated[
        str, option("relu, tanh, softplus, gelu or identity, for every layer. Default: tanh.", MODEL, "NAME")
    ] = "tanh",
    kernel_size: Annotated[
        int, option("Kernels of N x N pixels, padded by (N - 1) // 2 on every side. Default: 3.", MODEL, "N")
    ] = 3,
    stride: Annotated[int, option("Stride of every convolution. Default: 1.", MODEL, "N")] = 1,
    pooling: Annotated[
        str, option("none, average or max: 2 x 2 pooling after every layer. Default: none.", MODEL, "NAME")
    ] = "none",
    readout: Annotated[
        str, option("average (over positions) or flatten (one weight per position). Default: average.", MODEL, "NAME")
    ] = "average",
    loss: Annotated[str, option("squared, logistic or softmax. Default: squared.", OBJECTIVE, "NAME")] = "squared",
    source_penalty: Annotated[
        float,
        option(
            "Strength of the penalty on the flow out of every feature, between layers. Default: 0.0003.", OBJECTIVE, "X"
        ),
    ] = 3e-4,
    readout_penalty: Annotated[
        float, option("Strength of the penalty on the readout. Default: 0.003.", OBJECTIVE, "X")
    ] = 3e-3,
    input_penalty: Annotated[
        float, option("Strength of the penalty on first-layer kernels. Default: 0.0003.", OBJECTIVE, "X")
    ] = 3e-4,
    kernel_norm: Annotated[
        str,
        option(
            "Norm of a kernel in the source penalty and in the amplitude bound: l2 or l1. Default: l2.",
            OBJECTIVE,
            "NAME",
        ),
    ] = "l2",
    amplitude_bound: Annotated[
        float | None,
        option(
            "Bound on the total kernel into a feature of layers 2 and up; with unbounded activations such "
            "as relu a minimum exists only with both bounds. Default: no bound.",
            OBJECTIVE,
            "X",
        ),
    ] = None,
    input_bound: Annotated[
        float | None, option("Bound on the norm of a first-layer kernel. Default: no bound.", OBJECTIVE, "X")
    ] = None,
    seed: Annotated[
        int, option("Seed of the random start and of every draw in the report. Default: 0.", WORK, "N")
    ] = 0,
    rounds: Annotated[
        int, option("At most this many rounds, each a particle flow and a convex program. Default: 8.", WORK, "N")
    ] = 8,
    flow_steps: Annotated[
        int, option("Steps of the first flow; later flows take half as many. Default: 800.", WORK, "N")
    ] = 800,
    tolerance: Annotated[
        float, option("Stop when a flow ends within this share of J above the dual bound. Default: 0.0001.", WORK, "X")
    ] = 1e-4,
    grow: Annotated[
        int,
        option(
            "After every program search for features that no particle has yet and offer the best N to the next one; "
            "with it comes a lower bound over all measures, best of its starts. Default: 0, no search.",
            WORK,
            "N",
        ),
    ] = 0,
    max_seconds: Annotated[
        float | None,
        option("Stop the solve after about this many seconds and report what there is. Default: no limit.", WORK, "X"),
    ] = None,
    dtype: Annotated[
        str, option("float64 or float32. Gaps are computed in float64 either way. Default: float64.", WORK, "NAME")
    ] = "float64",
    device: Annotated[str, option("cpu or cuda. Default: cpu.", WORK, "NAME")] = "cpu",
    out: Annotated[
        Path | None,
        option(
            "Write report.html, PNG pictures, results.json and the network here; the directory is made if missing. "
            "Default: write nothing, print a summary.",
            OUTPUT,
            "DIR",
        ),
    ] = None,
    json: Annotated[
        bool,
        option(
            "Print the results as one JSON object on standard output, and nothing else there. Default: off.",
            OUTPUT,
            None,
            "--json",
        ),
    ] = False,
    quiet: Annotated[bool, option("No progress and no summary. Default: off.", OUTPUT, None, "--quiet")] = False,
) -> None:
    """Train a continuous CNN on real images, certify it, and write a report.

    Without any option this is the demonstration: handwritten 3 against 5 from scikit-learn, averaged down to 4x4
    pixels, in a network of two convolutional layers (3x3, tanh) with 64 and 32 particles. With --out it takes a minute
    or two and leaves a report that opens in any browser.

    Ctrl-C stops the solve, keeps the best network so far and says where it is.
    """
    with _one_line_errors():
        settings = {name: value for name, value in context.params.items() if name not in ("out", "json", "quiet")}
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
        _work(settings, out, json, quiet)


@app.command()
def widths(
    data: Annotated[
        str,
        option(
            "Images to learn: digits, mnist, a FILE.npz, or a DIRECTORY with a folder of images per class or the "
            "binary files "
            "of CIFAR. Default: digits.",
            DATA,
            "NAME|FILE|DIR",
        ),
    ] = "digits",
    classes: Annotated[
        str, option("Which classes to tell apart, separated by commas, or all. Default: 3,5.", DATA, "LIST")
    ] = "3,5",
    samples: Annotated[
        int, option("How many images; parts that train take half of them. Default: 16.", DATA, "N")
    ] = 16,
    pool: Annotated[
        int,
        option(
            "Average over windows of N x N pixels first; parts that train take windows of twice the size. Default: 2.",
            DATA,
            "N",
        ),
    ] = 2,
    part: Annotated[
        list[str] | None,
        option(
            "Only this part: sampled, limit, trained, trajectories, statistics, gallery, coordinates or kernel; may "
            "be given again. Default: all.",
            WORK,
            "NAME",
        ),
    ] = None,
    size: Annotated[
        str,
        option(
            "quick (a minute, shows that it runs), default (under 10 minutes on 2 cores) or full (hours). Default: "
            "default.",
            WORK,
            "NAME",
        ),
    ] = "default",
    seed: Annotated[int, option("First seed of everything that is drawn. Default: 0.", WORK, "N")] = 0,
    jobs: Annotated[int, option("Cells measured at a time, one thread each. Default: 2.", WORK, "N")] = 2,
    backend: Annotated[
        str,
        option(
            "Where joblib runs them: loky (processes of this machine), threading, dask or ray; the last two need their "
            "packages and, for a cluster, a connected client. Default: loky.",
            WORK,
            "NAME",
        ),
    ] = "loky",
    dtype: Annotated[str, option("float64 or float32. Default: float64.", WORK, "NAME")] = "float64",
    device: Annotated[str, option("cpu or cuda. Default: cpu.", WORK, "NAME")] = "cpu",
    out: Annotated[
        Path,
        option(
            "Where tables and finished cells go; the same directory again continues where it stopped. Default: "
            "runs/widths.",
            OUTPUT,
            "DIR",
        ),
    ] = Path("runs/widths"),
    report: Annotated[
        bool, option("Write widths.html and its pictures. Default: on.", OUTPUT, None, "--report/--no-report")
    ] = True,
    quiet: Annotated[bool, option("No progress. Default: off.", OUTPUT, None, "--quiet")] = False,
) -> None:
    """Measure how finite networks approach the continuous one, and write tables and a page.

    Networks sampled from a solved measure and trained from random starts, trajectories of their features, moments, a
    coordinate check of four parameterisations and a tangent kernel, each over widths and seeds. Finished cells are
    kept: after a stop of any kind the same command goes on and ends with the same tables.
    """
    with _one_line_errors(f"stopped; what was finished is in {out}, and the same command goes on from there"):
        if seed < 0 or jobs < 1:
            raise Misuse(f"seed={seed} must be at least 0" if seed < 0 else f"jobs={jobs} must be at least 1")
        _check_device(device)
        _check_writable(out)
        _widths(
            {
                "data": data,
                "classes": None if classes == "all" else tuple(_integers("classes", classes)),
                "samples": samples,
                "pool": pool,
                "dtype": dtype,
                "device": device,
            },
            part or [],
            size,
            seed,
            jobs,
            backend,
            out,
            report,
            quiet,
        )


def _widths(
    settings: dict[str, Any],
    parts: list[str],
    size: str,
    seed: int,
    jobs: int,
    backend: str,
    out: Path,
    report: bool,
    quiet: bool,
) -> None:
    from meanfield.bench.task import Task
    from meanfield.studies.widths import plan as width_study
    from meanfield.validation import one_of

    task, sizes = Task(**settings), width_study.SIZES[one_of(size, width_study.SIZES, "size")]
    chosen = [one_of(part, width_study.PARTS, "part") for part in parts] or width_study.PARTS
    cells = {part: cells for part, cells in width_study.plan(task, sizes, seed).items() if part in chosen}
    tables = _measure(
        cells,
        lambda announce: width_study.run(
            task, sizes, out, parts=chosen, seed=seed, jobs=jobs, backend=backend, announce=announce
        ),
        out,
        quiet,
    )
    if report:
        from meanfield.studies.widths import page as width_report

        command = " ".join(
            ["meanfield widths", f"--size {size}", f"--seed {seed}", *(f"--part {part}" for part in parts)]
        )
        typer.echo(f"page: {width_report.write(tables, out, command)}")


def _measure(
    cells: Mapping[str, Sequence[Cell]],
    run: Callable[[Callable[[str, Cell, bool], None]], Tables],
    out: Path,
    quiet: bool,
) -> Tables:
    """Run a study under a bar of progress over its cells, and say what was there already and which tables there are."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    total = sum(map(len, cells.values()))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    kept: list[bool] = []
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
        bar = progress.add_task("cells", total=total)

        def announce(part: str, cell: Cell, known: bool) -> None:
            kept.append(known)
            progress.update(bar, advance=1, description=part)

        tables = run(announce)
    if sum(kept):
        typer.echo(f"{sum(kept)} of {total} cells were there already", err=True)
    typer.echo(f"tables: {', '.join(f'{part}.csv' for part in tables)} in {out}")
    return tables


@app.command()
def graft(
    data: Annotated[
        str,
        option(
            "Images to learn, all classes: digits, mnist, a FILE.npz, or a DIRECTORY with a folder of images per "
            "class or the "
            "binary files of CIFAR. Default: digits.",
            DATA,
            "NAME|FILE|DIR",
        ),
    ] = "digits",
    pool: Annotated[int, option("Average over windows of N x N pixels first. Default: 1.", DATA, "N")] = 1,
    samples: Annotated[
        int | None,
        option(
            "How many images to train on; the rest is held out. Default: 80% of them (1437 digits), 50000 of CIFAR.",
            DATA,
            "N",
        ),
    ] = None,
    split: Annotated[
        bool | None,
        option(
            "Draw the images to train on at random, or take the first ones in file order. Default: --split; for CIFAR, "
            "whose test images come last, --file-order.",
            DATA,
            None,
            "--split/--file-order",
        ),
    ] = None,
    network: Annotated[
        str | None,
        option(
            "vgg8, vgg11, vgg13 or vgg16, with 5, 8, 10 or 13 convolutions. Default: vgg11; vgg16 for --size authors.",
            MODEL,
            "NAME",
        ),
    ] = None,
    width: Annotated[
        int | None,
        option(
            "Channels of the first convolution; later ones have up to 8 times as many. Default: 8; 64 for --size "
            "authors.",
            MODEL,
            "N",
        ),
    ] = None,
    penalty: Annotated[str, option("l12, l2 or none. Default: l12.", OBJECTIVE, "NAME")] = "l12",
    strength: Annotated[
        float | None, option("Strength of the penalty. Default: 1 for l12, 0.008 for l2.", OBJECTIVE, "X")
    ] = None,
    part: Annotated[
        list[str] | None,
        option(
            "Only this part: starts, classes, strengths, l2, across, epochs, trajectory, widths or procedures; may "
            "be given again. The networks that it needs are trained. Default: all that the size has.",
            WORK,
            "NAME",
        ),
    ] = None,
    size: Annotated[
        str,
        option(
            "quick (shows that it runs), default (under 3 minutes on 2 cores), full (half an hour, every part) or "
            "authors "
            "(200 epochs of the authors' recipe, meant for CIFAR and a GPU). Default: default.",
            WORK,
            "NAME",
        ),
    ] = "default",
    seed: Annotated[
        int, option("Number of the first pair of networks; pair k has seeds 2k and 2k + 1. Default: 0.", WORK, "N")
    ] = 0,
    jobs: Annotated[int, option("Cells measured at a time, one thread each. Default: 2.", WORK, "N")] = 2,
    backend: Annotated[
        str,
        option(
            "Where joblib runs them: loky (processes of this machine), threading, dask or ray; the last two need their "
            "packages and, for a cluster, a connected client. Default: loky.",
            WORK,
            "NAME",
        ),
    ] = "loky",
    dtype: Annotated[str, option("float32 or float64. Default: float32.", WORK, "NAME")] = "float32",
    device: Annotated[str, option("cpu or cuda. Default: cpu.", WORK, "NAME")] = "cpu",
    out: Annotated[
        Path,
        option(
            "Where tables, trained networks and finished cells go; the same directory again continues where it "
            "stopped. "
            "Default: runs/graft.",
            OUTPUT,
            "DIR",
        ),
    ] = Path("runs/graft"),
    report: Annotated[
        bool, option("Write graft.html and its pictures. Default: on.", OUTPUT, None, "--report/--no-report")
    ] = True,
    quiet: Annotated[bool, option("No progress. Default: off.", OUTPUT, None, "--quiet")] = False,
) -> None:
    """Measure whether networks from different starts learn the same features, and write tables and a page.

    Networks are trained from different starts and grafted: the lower layers of one, the upper layers of another, and
    between them one layer that least squares fits. How well that works, layer by layer and epoch by epoch, stands
    beside controls: donors untrained, trained on permuted labels, or rotated, and connections by optimal transport
    instead of least squares.

    By default this takes under three minutes on two cores. Trained networks and finished cells are kept: after a stop
    of any kind the same command goes on and ends with the same tables.
    """
    with _one_line_errors(f"stopped; what was finished is in {out}, and the same command goes on from there"):
        if seed < 0 or jobs < 1:
            raise Misuse(f"seed={seed} must be at least 0" if seed < 0 else f"jobs={jobs} must be at least 1")
        _check_device(device)
        _check_writable(out)
        settings = {
            "data": data,
            "pool": pool,
            "samples": samples,
            "split": split,
            "network": network,
            "width": width,
            "penalty": penalty,
            "strength": strength,
            "dtype": dtype,
            "device": device,
        }
        _graft(settings, part or [], size, seed, jobs, backend, out, report, quiet)


def _graft(
    settings: dict[str, Any],
    parts: list[str],
    size: str,
    seed: int,
    jobs: int,
    backend: str,
    out: Path,
    report: bool,
    quiet: bool,
) -> None:
    from meanfield.bench.classifiers import Classifier
    from meanfield.studies.grafting import plan as graft_study
    from meanfield.validation import one_of

    sizes = graft_study.SIZES[one_of(size, graft_study.SIZES, "size")]
    chosen = [one_of(part, graft_study.PARTS, "part") for part in parts] or graft_study.PARTS
    base = Classifier(**_divided(_network(settings, size)))
    cells = graft_study.plan(base, sizes, seed, chosen)
    tables = _measure(
        cells,
        lambda announce: graft_study.run(
            base, sizes, out, parts=chosen, seed=seed, jobs=jobs, backend=backend, announce=announce
        ),
        out,
        quiet,
    )
    if report:
        from meanfield.studies.grafting import page as graft_report

        named = [
            f"--{name} {getattr(base, name)}"
            for name in ("data", "pool", "samples", "network", "width", "penalty", "strength")
        ]
        named.insert(3, "--file-order" if base.split is None else "--split")
        command = " ".join(
            ["meanfield graft", *named, f"--size {size}", f"--seed {seed}", *(f"--part {part}" for part in parts)]
        )
        typer.echo(f"page: {graft_report.write(tables, out, command)}")


def _network(settings: dict[str, Any], size: str) -> dict[str, Any]:
    """Network, recipe and strength where they were left open; only networks that the controls can take apart."""
    from meanfield.bench.classifiers import NETWORKS
    from meanfield.studies.grafting.plan import L2_STRENGTH
    from meanfield.validation import one_of

    usual = {"network": "vgg16", "width": 64} if size == "authors" else {"network": "vgg11", "width": 8}
    usual["strength"] = {"l2": L2_STRENGTH, "none": 0.0}.get(settings["penalty"], 1.0)
    found = {name: usual[name] if value is None and name in usual else value for name, value in settings.items()}
    one_of(found["network"], [name for name in NETWORKS if name.startswith("vgg")], "network")
    return {**found, "preset": "authors" if size == "authors" else "default"}


def _divided(settings: dict[str, Any]) -> dict[str, Any]:
    """How many images to train on and which, where that was left open."""
    samples, split = settings["samples"], settings["split"]
    if samples is None or split is None:
        found = _load({**settings, "classes": None, "samples": None})
        official = found.name.startswith("CIFAR")
        samples = (CIFAR_TRAINING if official else len(found) * 4 // 5) if samples is None else samples
        split = not official if split is None else split
    return {**settings, "samples": samples, "split": 0 if split else None}


@contextlib.contextmanager
def _one_line_errors(stopped: str = "stopped before there was anything to keep") -> Iterator[None]:
    """What the library refuses is told in one line, without a traceback, and ends with exit code 2."""
    try:
        yield
    except KeyboardInterrupt:
        _stop(stopped, INTERRUPTED)
    except (ValueError, TypeError, OSError, ImportError, Misuse) as error:
        _stop(f"error: {_in_options(' '.join(str(error).split()))}", MISUSE)


def _stop(text: str, code: int) -> NoReturn:
    typer.echo(text, err=True)
    raise typer.Exit(code)


def _in_options(text: str) -> str:
    """Arguments of the library, told as options."""
    return ARGUMENTS.sub(lambda found: f"--{_option_name(found[1], quoted=bool(found[2]))}={found[2]}", text)


def _option_name(argument: str, *, quoted: bool) -> str:
    strength = argument in ("source", "input") or (argument == "readout" and not quoted)  # fields of Penalty
    return f"{argument}-penalty" if strength else argument.replace("_", "-")


def _work(settings: dict[str, Any], out: Path | None, as_json: bool, quiet: bool) -> None:
    _check(settings)
    if out is not None:
        _check_writable(out)
    from meanfield.studies.solve import measure as findings
    from meanfield.studies.solve import page as report

    data = _load(settings)
    problem = _problem(settings, data)
    said = _warn(problem)
    progress = _Progress(settings, enabled=not quiet and sys.stderr.isatty(), lines=not quiet)
    with progress:
        run = _solve(settings, data, problem, said, progress)
        if run.solution.status == "interrupted" or progress.interrupted:
            progress.stop()
            _keep(run, out, "stopped by Ctrl-C")
        try:
            figures = report.write(run, out, progress.say) if out is not None else _brief(run)
        except KeyboardInterrupt:
            progress.stop()
            _keep(run, out, "the report was stopped by Ctrl-C")
    if as_json:
        typer.echo(report.to_json(figures), nl=False)
    elif not quiet:
        _summarise(findings.solution_figures(problem, run.solution), out)


def _check(settings: dict[str, Any]) -> None:
    """Parse the lists and look at what no other check sees before the work begins."""
    settings["widths"] = _integers("widths", settings["widths"])
    settings["classes"] = None if settings["classes"] == "all" else _integers("classes", settings["classes"])
    if settings["classes"] is not None and len(settings["classes"]) < 2:
        raise Misuse(f"classes={settings['classes'][0]} is one class only; at least two are needed, such as 3,5")
    for name in ("rounds", "flow_steps", "kernel_size", "stride", "pool", "samples"):
        if settings[name] < 1:
            raise Misuse(f"{name}={settings[name]} must be an integer of at least 1")
    for name in ("seed", "grow"):
        if settings[name] < 0:
            raise Misuse(f"{name}={settings[name]} must be an integer of at least 0")
    for name in ("tolerance", "max_seconds"):
        value = settings[name]
        if value is not None and not (0 < value < math.inf):
            raise Misuse(f"{name}={value} must be a finite number greater than 0")
    from meanfield.validation import one_of

    one_of(settings["dtype"], ("float32", "float64"), "dtype")
    _check_device(settings["device"])


def _integers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise Misuse(
            f"{name}={text!r} must be integers separated by commas, such as {'3,5' if name == 'classes' else '64,32'}"
        ) from None


def _check_device(name: str) -> None:
    import torch

    from meanfield.validation import one_of

    one_of(name.split(":")[0], ("cpu", "cuda"), "device")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise Misuse(f"device={name!r} asks for CUDA, which torch does not find on this machine; use --device cpu")
    try:
        torch.zeros(1, device=name)
    except RuntimeError as error:
        raise Misuse(
            f"device={name!r} cannot be used ({str(error).splitlines()[0]}); use cpu, cuda or cuda:N"
        ) from None


def _check_writable(out: Path) -> None:
    """Refuse before the work begins."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".meanfield-{os.getpid()}"
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise Misuse(
            f"out={str(out)!r} cannot be written to ({error.strerror}); give a directory that you may write in"
        ) from None


def _load(settings: dict[str, Any]) -> Dataset:
    from meanfield.data import load

    try:
        return load(settings["data"], classes=settings["classes"], samples=settings["samples"], pool=settings["pool"])
    except (ValueError, OSError, ImportError) as error:
        named = ARGUMENTS.match(str(error))
        raise Misuse(str(error) if named else f"data={settings['data']!r}: {error}") from error


def _problem(settings: dict[str, Any], data: Dataset) -> Problem:
    from meanfield.bench.task import Task

    return Task.from_dict({**settings, "depth": len(settings["widths"])}).problem(data)


def _warn(problem: Problem) -> list[str]:
    """Say once, as a line, why a minimum may not exist."""
    missing = problem.missing_bounds()
    if not missing:
        return []
    wanted = " and ".join("--" + name.replace("_", "-") if name.isidentifier() else name for name in missing)
    text = (
        f"the infimum over all measures may not be attained: set {wanted}; otherwise the value may keep falling "
        f"while mass concentrates"
    )
    typer.echo(f"warning: {text}", err=True)
    return [text]


def _solve(settings: dict[str, Any], data: Dataset, problem: Problem, said: list[str], progress: _Progress) -> Run:
    import torch

    from meanfield import starts
    from meanfield.solvers import alternating
    from meanfield.studies.solve.measure import Run

    generator = torch.Generator().manual_seed(settings["seed"])
    start = starts.draw(problem, settings["widths"], generator, "low_rank")
    with warnings.catch_warnings(), _interrupts_wait(progress):
        warnings.filterwarnings("ignore", message="the infimum over all measures")
        solution = alternating.solve(
            problem,
            start,
            rounds=settings["rounds"],
            tolerance=settings["tolerance"],
            flow_steps=settings["flow_steps"],
            grow=settings["grow"],
            seed=settings["seed"],
            max_seconds=settings["max_seconds"] or math.inf,
            callback=progress,
        )
    training, held_out = data.split() if data.rest is not None else (data, None)
    return Run(problem, training, held_out, start, solution, settings, said, settings["seed"], settings["tolerance"])


@contextlib.contextmanager
def _interrupts_wait(progress: _Progress) -> Iterator[None]:
    """Ctrl-C waits for the solver's next record, where the best network is whole; a second one stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def remember(*_: object) -> None:
        if progress.interrupted:
            raise KeyboardInterrupt
        progress.interrupted = True

    previous = signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _keep(run: Run, out: Path | None, why: str) -> NoReturn:
    where = "was not written, for want of --out"
    if out is not None:
        from meanfield import storage
        from meanfield.studies.solve import page as report

        where = f"is in {report.save_network(run, out)}"
        storage.write_atomically(out / "results.json", report.to_json(_brief(run)))
    _stop(f"{why}: the best network so far, J = {run.solution.value:.8g}, {where}; there is no report", INTERRUPTED)


def _brief(run: Run) -> dict[str, Any]:
    from meanfield.studies.solve import measure as findings

    return {
        "settings": run.settings,
        "seed": run.seed,
        "versions": findings.versions(),
        "warnings": run.warnings,
        "solution": findings.solution_figures(run.problem, run.solution),
        "rounds": run.solution.history,
    }


def _summarise(figures: dict[str, Any], out: Path | None) -> None:
    typer.echo(
        f"J = {figures['value']:.8g}   duality gap {figures['gap']:.2g} on this support   particles "
        f"{' x '.join(map(str, figures['widths']))}"
    )
    typer.echo(f"{figures['message']}  ({figures['seconds']:.0f} s)")
    if out is not None:
        typer.echo(f"report: {out / 'report.html'}")


class _Progress:
    """Progress on stderr: a live line on a terminal, a line per round elsewhere.  Called with every row of a solver."""

    def __init__(self, settings: dict[str, Any], *, enabled: bool, lines: bool) -> None:
        self.settings, self.enabled, self.lines = settings, enabled, lines and not enabled
        self.began, self.bar, self.task = time.perf_counter(), None, None
        self.value = self.gap = math.nan
        self.interrupted = False

    def __enter__(self) -> _Progress:
        if self.enabled:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
            )
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self.bar.start()
            self.task = self.bar.add_task("start", total=self.settings["rounds"], figures="")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def say(self, text: str) -> None:
        """A stage of the report."""
        if self.bar is not None and self.task is not None:
            self.bar.update(
                self.task, description=f"report: {text}", completed=None, total=None, figures=f"J {self.value:.6g}"
            )
        elif self.lines:
            typer.echo(f"report: {text}", err=True)

    def __call__(self, row: dict[str, Any]) -> None:
        self.value, self.gap = row.get("value", self.value), row.get("gap", self.gap)
        rounds = self.settings["rounds"]
        if self.bar is not None and self.task is not None:
            text = f"round {row['round'] + 1} of at most {rounds}, {row['phase']}"
            self.bar.update(
                self.task, description=text, completed=row["round"] + self._share(row), figures=self._figures(row)
            )
        elif self.lines and row["phase"] == "round":
            typer.echo(
                f"round {row['round'] + 1} of at most {rounds}: {self._figures(row)}, {row['seconds']:.0f} s", err=True
            )
        if self.interrupted and (row["phase"] == "program" or row.get("step", 0) > 0):
            raise KeyboardInterrupt

    def _share(self, row: dict[str, Any]) -> float:
        """How much of the round is done; the flow counts as three quarters."""
        if row["phase"] == "flow":
            steps = self.settings["flow_steps"] if row["round"] == 0 else max(1, self.settings["flow_steps"] // 2)
            return 0.75 * min(1.0, row["step"] / steps)
        return 0.75 if row["phase"] == "program" else 1.0

    def _figures(self, row: dict[str, Any]) -> str:
        text = f"J {self.value:.6g}" + ("" if math.isnan(self.gap) else f", gap {self.gap:.1e}")
        if row["phase"] == "round":
            return text + f", flow ended {row['flow_gap']:.1e} above the dual bound"
        return text + self._left(row)

    def _left(self, row: dict[str, Any]) -> str:
        """Time left at the pace so far, to the round limit or to --max-seconds, whichever comes first."""
        elapsed, done = time.perf_counter() - self.began, row["round"] + self._share(row)
        if done < 0.02:
            return ""
        left = elapsed * (self.settings["rounds"] - done) / done
        if self.settings["max_seconds"] is not None:
            left = min(left, max(0.0, self.settings["max_seconds"] - elapsed))
        return f", at most about {left:.0f} s left"


if __name__ == "__main__":
    main()
