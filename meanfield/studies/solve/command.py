"""`meanfield solve`: the main job, watched, stopped in good order, and reported."""

from __future__ import annotations

import contextlib
import math
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from typing import Annotated, Any, NoReturn

import torch

from meanfield import limits, ranks, starts, storage
from meanfield.bench import reading, signals
from meanfield.bench.command import SHORT, say_data, stop
from meanfield.bench.options import (
    MODEL,
    OUTPUT,
    WORK,
    Classes,
    MaxMemory,
    MaxSeconds,
    Out,
    Overwrite,
    Pool,
    Quiet,
    Samples,
    Seed,
    at_least,
    flag,
    labels,
    listing,
    option,
    positive_integers,
)
from meanfield.bench.provenance import Provenance
from meanfield.bench.task import (
    InputPenalty,
    Learning,
    Loss,
    Pooling,
    Readout,
    ReadoutPenalty,
    SourcePenalty,
    Task,
)
from meanfield.data import Dataset
from meanfield.problem import Problem
from meanfield.solvers import alternating, memory
from meanfield.storage import networks, results
from meanfield.studies.solve import page
from meanfield.studies.solve.measure import heading, predictions, solution_figures
from meanfield.studies.solve.run import Run
from meanfield.validation import Misuse, positive

REPORT_SHARE = 0.25  # of --max-seconds


@dataclass(frozen=True, kw_only=True)
class Options(Learning):
    classes: Classes = None
    samples: Samples = 1000
    pool: Pool = 1
    pooling: Pooling = "average"
    readout: Readout = "flatten"
    loss: Loss = "softmax"
    source_penalty: SourcePenalty = 3e-5
    readout_penalty: ReadoutPenalty = 3e-5
    input_penalty: InputPenalty = 3e-5
    widths: Annotated[
        tuple[int, ...],
        listing("Particles per layer, separated by commas; as many layers as numbers.", MODEL),
        positive_integers,
    ] = (64, 32)
    seed: Seed = 0
    rounds: Annotated[
        int, option("At most this many rounds, each a particle flow and a convex program.", WORK), at_least(1)
    ] = 2
    flow_steps: Annotated[int, option("Steps of the first flow; later flows take half as many.", WORK), at_least(1)] = (
        1500
    )
    batch_size: Annotated[
        int, option("Images per step of a flow, drawn anew; all of them where there are no more.", WORK), at_least(1)
    ] = 100
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
    max_memory: MaxMemory = None
    pair: Annotated[
        tuple[int | str, ...] | None,
        listing(
            "Two classes of the small program that the second part of the report is about, where the whole one is too "
            "large for cvxpy. Without it: the two that are confused most.",
            OUTPUT,
        ),
        labels,
    ] = None
    out: Out = None
    overwrite: Overwrite = False
    json: Annotated[
        bool, flag("Print the results as one JSON object on standard output, and nothing else there.", OUTPUT)
    ] = False
    quiet: Quiet = False

    def task(self) -> Task:
        return Task.from_dict({**self.to_dict(), "depth": len(self.widths)})

    def pair_among(self, images: Dataset) -> tuple[int, int] | None:
        """Positions of `pair` among the classes, of which there must be images."""
        if self.pair is None:
            return None
        names, wanted = list(images.class_names), [str(each) for each in self.pair]
        present = [names[place] for place in images.indices.unique().tolist()]
        if len(wanted) != 2 or wanted[0] == wanted[1] or not set(wanted) <= set(present):
            known = ", ".join(present[:12]) + (", ..." if len(present) > 12 else "")
            raise Misuse("pair", self.pair, f"must be two of the classes {known}")
        first, second = map(names.index, wanted)
        return first, second


def command(options: Options) -> None:
    """Train a continuous CNN on real images, certify it, and write a report.

    Without any option these are 1,000 handwritten digits of scikit-learn, all ten, in a network of two convolutional
    layers (3x3, tanh, averaged over 2x2 positions) with 64 and 32 particles. With --out it takes about two minutes and
    leaves report.html, which opens in any browser, its pictures, results.json and the network; without it a summary is
    printed and nothing is written.

    The report has two parts. The first is about these images, with a network of finite width beside the answer. What
    only a small program allows (the same program in cvxpy, lines between solutions, finite networks of many widths) is
    measured of the same program where it is small, and otherwise of 16 images of two classes, averaged down to 4x4.

    --max-seconds is for the solve; measurements of the report that take longer than what it leaves, or a quarter more,
    are cut short or left out.

    Ctrl-C, SIGTERM and SIGHUP stop the solve, keep the best network so far and say where it is. An earlier report in
    the same directory is replaced as a whole.

    torchrun --nproc-per-node 2 -m meanfield solve ... shares the images among processes, on one machine or many; the
    first one prints, writes and measures the report. With --device cuda each has a card of its own.
    """
    if not ranks.first():
        options = options.variant(out=None, json=False, quiet=True)
        warnings.simplefilter("ignore")  # rank 0 says it
    with contextlib.ExitStack() as stack:
        result = None
        if options.out is not None:
            reading.refuse_inside(options.out, options.data)
            result = stack.enter_context(
                results.opened(options.out, networks.RESULT, page.FILES, overwrite=options.overwrite)
            )
        stack.enter_context(limits.memory(options.max_memory or math.inf))
        images = options.task().images()
        pair = options.pair_among(images)
        problem = options.variant(device=ranks.device(options.device)).task().problem(images)
        memory.require(
            problem, options.widths, batch=options.batch_size, grow=options.grow, starts=alternating.CONFIRMING_STARTS
        )
        say_data(images.summary, options.quiet)
        said = _warn(problem)
        watch = stack.enter_context(
            Progress(options, enabled=not options.quiet and sys.stderr.isatty(), lines=not options.quiet)
        )
        with signals.waiting():
            run = _solve(options, images, problem, pair, said, watch)
            if not ranks.first():
                raise SystemExit(signals.exit_code() if run.solution.status == "interrupted" else 0)
            figures = _keep(run, result)
        if run.solution.status == "interrupted" or signals.came():
            _ended(run, result, watch)
        if run.solution.status == "out_of_memory":
            _ended(run, result, watch, "memory ran out", SHORT)
        if result is not None:
            try:
                with limits.within(_for_report(options, run)):
                    figures, written = page.files(run, watch.say)
                stack.enter_context(signals.held())  # from here on there is a report
            except KeyboardInterrupt:
                _ended(run, result, watch)
            except (MemoryError, RuntimeError) as error:
                if not limits.is_shortage(error):
                    raise
                _ended(run, result, watch, "memory ran out", SHORT)
            result.publish(written)
        else:
            figures = {**figures, "predictions": predictions(run)}
    if options.json:
        sys.stdout.write(storage.to_json(figures))
    elif not options.quiet:
        _summarise(figures, options)


def _for_report(options: Options, run: Run) -> float:
    """Seconds: what the solve has left of --max-seconds, or a share of it on top."""
    if options.max_seconds is None:
        return math.inf
    return max(options.max_seconds - run.solution.seconds, REPORT_SHARE * options.max_seconds)


def _keep(run: Run, result: results.Result | None) -> dict[str, Any]:
    """Write the network and what is known so far, before the report takes its time; returns the figures."""
    with signals.held():
        figures = {**heading(run), "solution": solution_figures(run.problem, run.solution)}
        figures["rounds"] = run.solution.history
        if result is not None:
            result.publish(page.network_files(run, figures))
    return figures


def _ended(
    run: Run, result: results.Result | None, watch: Progress, why: str | None = None, code: int | None = None
) -> NoReturn:
    """The end without a report, after a signal where nothing else is said."""
    watch.stop()
    where = "was not written, for want of --out"
    if result is not None:
        where = f"is in {result.directory / networks.NETWORK}"
    best = f"the best network so far, J = {run.solution.value:.8g}, {where}; there is no report"
    stop(f"{why or f'stopped by {signals.last()}'}: {best}", signals.exit_code() if code is None else code)


def _warn(problem: Problem) -> list[str]:
    """Say once, as a line, why a minimum may not exist."""
    missing = problem.missing_bounds()
    if not missing or not ranks.first():
        return []
    wanted = " and ".join("--" + name.replace("_", "-") if name.isidentifier() else name for name in missing)
    text = (
        f"the infimum over all measures may not be attained: set {wanted}; otherwise the value may keep falling while "
        "mass concentrates"
    )
    print(f"warning: {text}", file=sys.stderr)
    return [text]


def _solve(
    options: Options,
    images: Dataset,
    problem: Problem,
    pair: tuple[int, int] | None,
    said: list[str],
    watch: Progress,
) -> Run:
    # before the work: the digest is of what runs, whatever is edited in the meantime
    made = asdict(Provenance(options.command_line(*ranks.program(), "solve"), options.to_dict(), data=images.summary))
    training, held_out = images.split() if images.rest is not None else (images, None)
    start = starts.draw(problem, options.widths, torch.Generator().manual_seed(options.seed), "low_rank")
    with warnings.catch_warnings(), limits.watched(signals.look), ranks.together() as group:
        warnings.filterwarnings("ignore", message="the infimum over all measures")
        solution = alternating.solve(
            problem.sharded(group),
            start.map(group.agreed),
            seed=options.seed,
            rounds=options.rounds,
            tolerance=options.tolerance,
            flow_steps=options.flow_steps,
            batch_size=options.batch_size if options.batch_size < len(training) else None,
            grow=options.grow,
            max_seconds=options.max_seconds or math.inf,
            callback=watch,
        )
    return Run(problem, training, held_out, start, solution, made, options.seed, said, pair)


def _summarise(figures: dict[str, Any], options: Options) -> None:
    answer, judged = figures["solution"], figures["predictions"]
    particles = " x ".join(map(str, answer["widths"]))
    print(f"J = {answer['value']:.8g}   duality gap {answer['gap']:.2g} on this support   particles {particles}")
    print(f"right: {_right(judged)}")
    if "value" in figures.get("peer", {}):
        peer = figures["peer"]
        print(f"a finite network of the same layers, trained by Adam: J = {peer['value']:.5g}, right: {_right(peer)}")
    print(f"{answer['message']}  ({answer['seconds']:.0f} s)")
    if options.out is not None:
        print(f"report: {options.out / page.REPORT}")


def _right(judged: dict[str, Any]) -> str:
    named = {"training": judged["training"], "held-out": judged["held_out"]}
    return ", ".join(
        f"{each['accuracy']:.2%} of {each['count']:,} {name} images" for name, each in named.items() if each
    )


class Progress:
    """Progress on stderr: a live line on a terminal, a line per round elsewhere.  Called with every row of a solver."""

    def __init__(self, options: Options, *, enabled: bool, lines: bool) -> None:
        self.options, self.enabled, self.lines = options, enabled, lines and not enabled
        self.began, self.bar, self.task = time.perf_counter(), None, None
        self.value = self.gap = math.nan

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
