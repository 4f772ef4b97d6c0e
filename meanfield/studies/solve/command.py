"""`meanfield solve`: the main job, watched, stopped in good order, and reported."""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch

from meanfield import certificates, limits, ranks, starts, storage
from meanfield.bench import reading, signals
from meanfield.bench.command import SHORT, say_data, stop
from meanfield.bench.options import (
    DATA,
    MODEL,
    OBJECTIVE,
    OUTPUT,
    WORK,
    Classes,
    MaxMemory,
    MaxSeconds,
    Out,
    Overwrite,
    Pool,
    Quiet,
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
    SourcePenalty,
    Task,
)
from meanfield.data import Dataset
from meanfield.problem import Problem
from meanfield.solvers import alternating, memory
from meanfield.solvers.solution import ENDED_EARLY, Solution
from meanfield.storage import networks, results
from meanfield.studies.solve import page
from meanfield.studies.solve.measure import heading, predictions, solution_figures
from meanfield.studies.solve.progress import Progress
from meanfield.studies.solve.run import Run
from meanfield.validation import Misuse, nonnegative, positive

REPORT_SHARE = 0.25  # of --max-seconds
SAMPLES = 1000  # unless told otherwise
READOUT_PENALTY = 5e-4
STATE = "state.safetensors"


@dataclass(frozen=True, kw_only=True)
class Options(Learning):
    classes: Classes = None
    samples: Annotated[  # pyright: ignore[reportIncompatibleVariableOverride] - the Task has a number
        int | None,
        option(
            "How many images to use, the first ones in file order, or one of every class in turn where the source "
            f"keeps classes apart; the rest is held out. Without it: {SAMPLES:,}, or four fifths of fewer.",
            DATA,
        ),
        at_least(1),
    ] = None
    pool: Pool = 1
    pooling: Pooling = "average"
    readout: Readout = "flatten"
    loss: Loss = "softmax"
    source_penalty: SourcePenalty = 3e-5
    readout_penalty: Annotated[  # pyright: ignore[reportIncompatibleVariableOverride] - the Task has a number
        float | None,
        option(
            "Strength of the penalty on the readout. Without it: 5e-4, over the square of the positions of a flattened "
            "readout, whose weights are as large as there are positions.",
            OBJECTIVE,
        ),
        nonnegative,
    ] = None
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
    attained: Annotated[
        float | None,
        option(
            "The lowest J that another run of the same problem has reached: it refutes a bound of a search above it. "
            "Without it: the J of this run alone does.",
            WORK,
        ),
        nonnegative,
    ] = None
    prove: Annotated[
        float,
        option(
            "After the solve, and beyond --max-seconds, spend so many seconds on a lower bound over all measures that "
            "is proven: for one ReLU layer, or two of tanh, erf or hardtanh, with --readout average. 0: none.",
            WORK,
        ),
        nonnegative,
    ] = 0.0
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
    resume: Annotated[
        bool,
        flag(
            "Go on from where a solve with the same options in --out was broken off: by a kill, a signal or a limit, "
            "of which --rounds, --attained, --prove and --max-seconds may have other values now. Without it, or where "
            "there is nothing to go on from, a solve starts anew.",
            OUTPUT,
        ),
    ] = False
    overwrite: Overwrite = False
    json: Annotated[
        bool, flag("Print the results as one JSON object on standard output, and nothing else there.", OUTPUT)
    ] = False
    quiet: Quiet = False

    def images(self) -> Dataset:
        """The selected images; those held out are their `rest`."""
        samples = usual_samples if self.samples is None else self.samples
        return reading.images(self.data, self.classes, samples, self.pool, self.split)

    def task(self, images: Dataset) -> Task:
        """What is to be learnt of these images."""
        known = {"samples": len(images), "depth": len(self.widths), "readout_penalty": self.readout_penalty or 0.0}
        task = Task.from_dict({**self.to_dict(), **known})
        if self.readout_penalty is not None:
            return task
        positions = task.architecture(images).readout_positions if self.readout == "flatten" else 1
        return task.variant(readout_penalty=READOUT_PENALTY / positions**2)

    @property
    def state(self) -> Path | None:
        """The file from which a solve that was broken off goes on."""
        return None if self.out is None else self.out / STATE

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


def usual_samples(available: int) -> int:
    """How many of so many images are learnt from where nobody says it: some are left to be judged on."""
    return max(2, min(SAMPLES, available * 4 // 5))


def command(options: Options) -> None:
    """Train a continuous CNN on real images, certify it, and write a report.

    Without any option these are 1,000 handwritten digits of scikit-learn, all ten, in a network of two convolutional
    layers (3x3, tanh, averaged over 2x2 positions) with 64 and 32 particles. With --out it takes about two minutes and
    leaves report.html, which opens in any browser, its pictures, results.json and the network; without it a summary is
    printed and nothing is written.

    The report has two parts. The first is about these images, with a network of finite width beside the answer. What
    only a small program allows (the same program in cvxpy, lines between solutions, finite networks of many widths) is
    measured of the same program where it is small, and otherwise of 16 images of two classes, averaged down to 4x4.

    --prove is for a lower bound that no network of any width can pass, after the solve; the report draws how it rose.
    Where time ended it, --resume with more seconds goes on from its tree.

    --max-seconds is for the solve; measurements of the report that take longer than what it leaves, or a quarter more,
    are cut short or left out.

    Ctrl-C, SIGTERM and SIGHUP stop the solve, keep the best network so far and what is proven, and say where it is. An
    earlier report in the same directory is replaced as a whole. With --out a solve can go on, also after a kill:
    --resume ends at the same network, to the last bit on one machine, as if nothing had happened.

    torchrun --nproc-per-node 2 -m meanfield solve ... shares the images among processes, on one machine or many; the
    first one prints, writes and measures the report. With --device cuda each has a card of its own.
    """
    if options.resume and options.out is None:
        raise Misuse("resume", True, "needs --out, the directory of the solve that is to go on")
    state = options.state
    if not ranks.first():
        options = options.variant(out=None, resume=False, json=False, quiet=True)
        warnings.simplefilter("ignore")  # rank 0 says it
    with contextlib.ExitStack() as stack:
        result = None
        if options.out is not None:
            reading.refuse_inside(options.out, options.data)
            result = stack.enter_context(
                results.opened(options.out, networks.RESULT, page.FILES, overwrite=options.overwrite)
            )
        stack.enter_context(limits.memory(options.max_memory or math.inf))
        images = options.images()
        pair = options.pair_among(images)
        problem = options.variant(device=ranks.device(options.device)).task(images).problem(images)
        memory.require(
            problem, options.widths, batch=options.batch_size, grow=options.grow, starts=alternating.CONFIRMING_STARTS
        )
        say_data(images.summary, options.quiet)
        said = _warn(problem, options.prove)
        if result is not None:  # nothing is refused from here on
            _prepare(state, options)
        watch = stack.enter_context(
            Progress(
                options.rounds,
                options.flow_steps,
                options.max_seconds,
                live=not options.quiet and sys.stderr.isatty(),
                lines=not options.quiet,
            )
        )
        with signals.waiting():
            try:
                run = _solve(options, images, problem, pair, said, watch, state)
            except Misuse as error:
                raise _of_resume(error) from error
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
            if not _goes_on(run.solution, options.prove):
                remove_state(state)
        else:
            figures = {**figures, "predictions": predictions(run)}
    if options.json:
        sys.stdout.write(storage.to_json(figures))
    elif not options.quiet:
        _summarise(figures, options)


def _goes_on(solution: Solution, prove: float) -> bool:
    """Whether more rounds, or a proof of more seconds than these, would add to it."""
    proven = solution.proven
    open_proof = proven is not None and not proven.reason and proven.seconds >= prove
    return solution.status in (*ENDED_EARLY, "max_rounds") or open_proof


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


def _warn(problem: Problem, prove: float) -> list[str]:
    """Say once, each as a line, why a minimum may not exist and why nothing will be proven."""
    said = [text for text in (_unattained(problem), _unproven(problem, prove)) if text and ranks.first()]
    for text in said:
        print(f"warning: {text}", file=sys.stderr)
    return said


def _unproven(problem: Problem, prove: float) -> str:
    reason = certificates.no_method(problem) if prove else ""
    return reason and f"--prove proves nothing here: {reason}"


def _unattained(problem: Problem) -> str:
    missing = problem.missing_bounds()
    if not missing:
        return ""
    wanted = " and ".join("--" + name.replace("_", "-") if name.isidentifier() else name for name in missing)
    return (
        f"the infimum over all measures may not be attained: set {wanted}; otherwise the value may keep falling while "
        "mass concentrates"
    )


def _solve(
    options: Options,
    images: Dataset,
    problem: Problem,
    pair: tuple[int, int] | None,
    said: list[str],
    watch: Progress,
    state: Path | None,
) -> Run:
    # before the work: the digest is of what runs, whatever is edited in the meantime
    settled = {**options.to_dict(), "samples": len(images), "readout_penalty": problem.penalty.readout}
    made = asdict(Provenance(options.command_line(*ranks.program(), "solve"), settled, data=images.summary))
    training, held_out = images.split() if images.rest is not None else (images, None)
    start = starts.draw(problem, options.widths, torch.Generator().manual_seed(options.seed), "low_rank")
    with warnings.catch_warnings(), limits.watched(signals.look), ranks.together() as group:
        for text in ("the infimum over all measures", "nothing will be proven"):
            warnings.filterwarnings("ignore", message=text)
        solution = alternating.solve(
            problem.sharded(group),
            start.map(group.agreed),
            seed=options.seed,
            rounds=options.rounds,
            tolerance=options.tolerance,
            flow_steps=options.flow_steps,
            batch_size=options.batch_size if options.batch_size < len(training) else None,
            grow=options.grow,
            attained=options.attained,
            max_seconds=options.max_seconds or math.inf,
            prove=options.prove,
            state=state,
            callback=watch,
        )
    return Run(problem, training, held_out, start, solution, made, options.seed, said, pair)


def _prepare(state: Path | None, options: Options) -> None:
    """Begin anew, or say that there is nothing to go on from."""
    if not options.resume:
        remove_state(state)
    elif not _state_files(state) and not options.quiet:
        print(f"nothing to go on from in {options.out}: the solve starts anew", file=sys.stderr)


def _of_resume(error: Misuse) -> Misuse:
    """In the words of the command line, which has no --state."""
    if error.argument != "state":
        return error
    return Misuse("resume", True, f"cannot go on from {error.value}, which {error.remedy}")


def _state_files(state: Path | None) -> list[Path]:
    """Those of the alternation, of its flow and of its proof that are there."""
    if state is None:
        return []
    files = state, alternating.flow_state(state), alternating.proof_state(state)
    return [each for each in files if each.exists()]


def remove_state(state: Path | None) -> None:
    """With those of its flow and of its proof."""
    for each in _state_files(state):
        each.unlink(missing_ok=True)


def _summarise(figures: dict[str, Any], options: Options) -> None:
    answer, judged = figures["solution"], figures["predictions"]
    particles = " x ".join(map(str, answer["widths"]))
    print(f"J = {answer['value']:.8g}   duality gap {answer['gap']:.2g} on this support   particles {particles}")
    if answer["proven"] and not answer["proven"]["reason"]:
        print(f"proven: no network lies below {answer['proven']['value']:.8g}, {answer['proven']['share']:.2%} of J")
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
