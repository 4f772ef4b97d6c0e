"""`meanfield solve`: the main job, watched, stopped in good order, and reported."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any, NoReturn

import torch

from meanfield import starts, storage
from meanfield.bench.command import INTERRUPTED, say_data, stop, writable
from meanfield.bench.options import (
    MODEL,
    OUTPUT,
    WORK,
    MaxSeconds,
    Out,
    Quiet,
    Seed,
    at_least,
    flag,
    listing,
    option,
    positive_integers,
)
from meanfield.bench.provenance import Provenance
from meanfield.bench.task import Learning, Task
from meanfield.data import Dataset
from meanfield.problem import Problem
from meanfield.solvers import alternating
from meanfield.studies.solve import page
from meanfield.studies.solve.measure import Run, heading, solution_figures
from meanfield.validation import positive


@dataclass(frozen=True, kw_only=True)
class Options(Learning):
    widths: Annotated[
        tuple[int, ...],
        listing("Particles per layer, separated by commas; as many layers as numbers.", MODEL),
        positive_integers,
    ] = (64, 32)
    seed: Seed = 0
    rounds: Annotated[
        int, option("At most this many rounds, each a particle flow and a convex program.", WORK), at_least(1)
    ] = 8
    flow_steps: Annotated[int, option("Steps of the first flow; later flows take half as many.", WORK), at_least(1)] = (
        800
    )
    tolerance: Annotated[
        float, option("Stop when a flow ends within this share of J above the dual bound.", WORK), positive
    ] = 1e-4
    grow: Annotated[
        int,
        option(
            "After every program search for features that no particle has yet and offer the best N to the next one; "
            "with it comes a lower bound over all measures, best of its starts. 0: no search.",
            WORK,
        ),
        at_least(0),
    ] = 0
    max_seconds: MaxSeconds = None
    out: Out = None
    json: Annotated[
        bool, flag("Print the results as one JSON object on standard output, and nothing else there.", OUTPUT)
    ] = False
    quiet: Quiet = False

    def task(self) -> Task:
        return Task.from_dict({**self.to_dict(), "depth": len(self.widths)})


def command(options: Options) -> None:
    """Train a continuous CNN on real images, certify it, and write a report.

    Without any option this is the demonstration: handwritten 3 against 5 from scikit-learn, averaged down to 4x4
    pixels, in a network of two convolutional layers (3x3, tanh) with 64 and 32 particles. With --out it takes a minute
    or two and leaves report.html, which opens in any browser, its pictures, results.json and the network; without it a
    summary is printed and nothing is written.

    Ctrl-C stops the solve, keeps the best network so far and says where it is.
    """
    if options.out is not None:
        writable(options.out)
    images = options.task().images()
    problem = options.task().problem(images)
    say_data(images.summary, options.quiet)
    said = _warn(problem)
    watch = Progress(options, enabled=not options.quiet and sys.stderr.isatty(), lines=not options.quiet)
    with watch:
        run = _solve(options, images, problem, said, watch)
        if run.solution.status == "interrupted" or watch.interrupted:
            watch.stop()
            _keep(run, options, "stopped by Ctrl-C")
        try:
            figures = _brief(run) if options.out is None else page.write(run, options.out, watch.say)
        except KeyboardInterrupt:
            watch.stop()
            _keep(run, options, "the report was stopped by Ctrl-C")
    if options.json:
        sys.stdout.write(storage.to_json(figures))
    elif not options.quiet:
        _summarise(figures["solution"], options)


def _warn(problem: Problem) -> list[str]:
    """Say once, as a line, why a minimum may not exist."""
    missing = problem.missing_bounds()
    if not missing:
        return []
    wanted = " and ".join("--" + name.replace("_", "-") if name.isidentifier() else name for name in missing)
    text = (
        f"the infimum over all measures may not be attained: set {wanted}; otherwise the value may keep falling while "
        "mass concentrates"
    )
    print(f"warning: {text}", file=sys.stderr)
    return [text]


def _solve(options: Options, images: Dataset, problem: Problem, said: list[str], watch: Progress) -> Run:
    # before the work: the digest is of what runs, whatever is edited in the meantime
    made = asdict(Provenance(options.command_line("meanfield", "solve"), options.to_dict(), data=images.summary))
    start = starts.draw(problem, options.widths, torch.Generator().manual_seed(options.seed), "low_rank")
    with warnings.catch_warnings(), _interrupts_wait(watch):
        warnings.filterwarnings("ignore", message="the infimum over all measures")
        solution = alternating.solve(
            problem,
            start,
            seed=options.seed,
            rounds=options.rounds,
            tolerance=options.tolerance,
            flow_steps=options.flow_steps,
            grow=options.grow,
            max_seconds=options.max_seconds or math.inf,
            callback=watch,
        )
    training, held_out = images.split() if images.rest is not None else (images, None)
    return Run(problem, training, held_out, start, solution, made, options.seed, said)


@contextlib.contextmanager
def _interrupts_wait(watch: Progress) -> Iterator[None]:
    """Ctrl-C waits for the solver's next record, where the best network is whole; a second one stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def remember(*_: object) -> None:
        if watch.interrupted:
            raise KeyboardInterrupt
        watch.interrupted = True

    previous = signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _keep(run: Run, options: Options, why: str) -> NoReturn:
    where = "was not written, for want of --out"
    if options.out is not None:
        where = f"is in {page.save_network(run, options.out)}"
        storage.write_atomically(options.out / "results.json", storage.to_json(_brief(run)))
    stop(f"{why}: the best network so far, J = {run.solution.value:.8g}, {where}; there is no report", INTERRUPTED)


def _brief(run: Run) -> dict[str, Any]:
    return {**heading(run), "solution": solution_figures(run.problem, run.solution), "rounds": run.solution.history}


def _summarise(figures: dict[str, Any], options: Options) -> None:
    particles = " x ".join(map(str, figures["widths"]))
    print(f"J = {figures['value']:.8g}   duality gap {figures['gap']:.2g} on this support   particles {particles}")
    print(f"{figures['message']}  ({figures['seconds']:.0f} s)")
    if options.out is not None:
        print(f"report: {options.out / 'report.html'}")


class Progress:
    """Progress on stderr: a live line on a terminal, a line per round elsewhere.  Called with every row of a solver."""

    def __init__(self, options: Options, *, enabled: bool, lines: bool) -> None:
        self.options, self.enabled, self.lines = options, enabled, lines and not enabled
        self.began, self.bar, self.task = time.perf_counter(), None, None
        self.value = self.gap = math.nan
        self.interrupted = False

    def __enter__(self) -> Progress:
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
            self.task = self.bar.add_task("start", total=self.options.rounds, figures="")
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
            print(f"report: {text}", file=sys.stderr)

    def __call__(self, row: dict[str, Any]) -> None:
        self.value, self.gap = row.get("value", self.value), row.get("gap", self.gap)
        rounds = self.options.rounds
        if self.bar is not None and self.task is not None:
            text = f"round {row['round'] + 1} of at most {rounds}, {row['phase']}"
            self.bar.update(
                self.task, description=text, completed=row["round"] + self._share(row), figures=self._figures(row)
            )
        elif self.lines and row["phase"] == "round":
            print(
                f"round {row['round'] + 1} of at most {rounds}: {self._figures(row)}, {row['seconds']:.0f} s",
                file=sys.stderr,
            )
        if self.interrupted and (row["phase"] == "program" or row.get("step", 0) > 0):
            raise KeyboardInterrupt

    def _share(self, row: dict[str, Any]) -> float:
        """How much of the round is done; the flow counts as three quarters."""
        if row["phase"] == "flow":
            steps = self.options.flow_steps if row["round"] == 0 else max(1, self.options.flow_steps // 2)
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
        left = elapsed * (self.options.rounds - done) / done
        if self.options.max_seconds is not None:
            left = min(left, max(0.0, self.options.max_seconds - elapsed))
        return f", at most about {left:.0f} s left"
