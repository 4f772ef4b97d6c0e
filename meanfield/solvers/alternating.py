"""The outer loop, repopulation: flow, freeze, solve the convex program, return, grow.  Fang et al. 2019, algorithm 1.

A round's `flow_gap`, the value after its flow minus the dual value of the program frozen there, measures the
alternation; the gap right after a convex solve is small by construction and measures only the solver.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch

from meanfield import certificates, limits, measures, validation
from meanfield.certificates import ProvenBound, UnseenFeatures
from meanfield.convex.program import ConvexProgram
from meanfield.network import ParticleNetwork
from meanfield.problem import Problem
from meanfield.signatures import Count, Gibibytes, Natural, Nonnegative, Number, Positive, Seconds, Seed, checked
from meanfield.solvers import flow, memory, splitting
from meanfield.solvers.solution import ENDED_EARLY, Solution, message
from meanfield.storage import states
from meanfield.storage.states import StateFile
from meanfield.validation import Misuse, path

RATE, RATE_DECAY, RATE_CUT, LEAST_RATE = 0.1, 0.7, 0.25, 1e-3
CLONE_NOISE = 0.3
NO_SEARCH = {
    "search_bound": -math.inf,
    "search_starts": 0,
    "search_reached": 0,
    "unseen_chance": 1.0,
    "unseen_lowering": math.inf,
    "refuted_bound": None,
    "proven_bound": None,
}
NO_GROWTH = {**NO_SEARCH, "added": 0, "kept": []}
STARTS, CONFIRMING_STARTS = 64, 256  # of a search for new features


@checked
@torch.inference_mode(False)
def solve(
    problem: Problem,
    network: ParticleNetwork,
    *,
    rounds: Count = 8,
    tolerance: Positive = 1e-4,
    flow_steps: Count = 2000,
    later_steps: Count | None = None,
    batch_size: Count | None = None,
    program_tolerance: Positive | None = None,
    program_iterations: Count = 4000,
    clones: Sequence[int] | None = None,
    grow: Natural = 0,
    attained: Number | None = None,
    seed: Seed = 0,
    max_seconds: Seconds = math.inf,
    prove: Nonnegative = 0.0,
    max_memory: Gibibytes = math.inf,
    state: Annotated[str | Path, path] | None = None,
    state_seconds: Seconds = states.STATE_SECONDS,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> Solution:
    """Alternate flow and convex program from `network` until a flow ends within `tolerance` (relative to J) of optimal.

    grow > 0 adds up to that many new features after every program, the best that `certificates.search_features` finds,
    as candidates of zero mass for the next one (column generation).  Then the loop ends when J is within `tolerance` of
    the search's lower bound over all measures (best of its starts; the message says what is left otherwise), and
    `Solution.lower_bound` is set only where a bound is proven.  A bound above J is refuted by the network in hand: its
    search missed features; J stands in its place, it ends no run, and the message warns of it.  attained: the lowest J
    that other runs of the same problem have reached, which refutes a bound above it too.

    prove: seconds after the solve, on top of max_seconds, for a lower bound of J over all measures that is proven
    (`certificates.prove`: one ReLU layer, or two of tanh, erf or hardtanh, average readout); it is in
    `Solution.proven`, the best one of the run in `Solution.lower_bound`.  Where there is no method, a warning says why
    before the run starts.  A run that was stopped by the user or for want of memory is not proven of; a stop of the
    proof keeps what is proven.

    flow_steps: steps of the first round's flow; later rounds take later_steps (default: half) at rates that decay by
    RATE_DECAY a round.  batch_size: images per step of the flows (default: all); J is always that of all.  A flow that
    does not lower J proves nothing, as its program was solved a round before: the next one runs at RATE_CUT of its
    rate, and only a flow that lowers J, or fails at LEAST_RATE, can end the alternation.
    program_tolerance: relative gap of the convex solves (default: tolerance / 5).  clones[l]:
    perturbed clones of the heaviest particles of layer l that enter each program as candidates of zero mass.  A round
    that would raise J is rejected, so J never rises.

    state: file (.safetensors) to which the state of the alternation is written after every flow and every program, with
    two beside it that are written every `state_seconds` seconds: by the flow (.flow.safetensors), and by the proof
    (.proof.safetensors), with the tree of its branch and bound.  A call with the same arguments, of which `rounds`,
    `max_seconds`, `prove` and `attained` may be others, continues from there and ends, on the same machine and as many
    threads, with the same bits as a run without a pause (seconds and what is proven in them excepted); a program that
    was broken off is solved anew.  A larger `prove` goes on from the tree; another round is another network, and drops
    it.  A run that has ended leaves the files, from which the answer comes at once, for the caller to remove.  A file
    that is damaged or of other arguments or data is refused (ValueError).

    max_memory: what this process may hold, as in `limits.memory` (GiB, or "500MiB"; default: limits.FREE_SHARE of what
    is free on top of what it holds).  A run that will need more is refused before it starts, with what would fit.

    History rows, one per round: round, seconds, rate, flow_value, flow_drop (what the flow took off J), flow_speed (its
    metric speed at the end), flow_gap, value, dual_value, gap, violation, widths, accepted, flow_steps,
    program_iterations; with grow also search_bound (best of search_starts starts), search_reached, unseen_chance and
    unseen_lowering (as in `UnseenFeatures`), refuted_bound (what the search gave where J refutes it; else None),
    proven_bound, added (how many features entered this program), kept (which particles of the network after it they
    are, where they have mass).
    callback receives every row of the inner histories, marked with "round" and "phase" ("flow", "program"), each
    round's own row (phase "round"), and those of the proof (phase "proof").
    """
    problem.penalty.require_certifiable("solve")
    if grow and problem.ranks.count > 1:
        raise Misuse("grow", grow, f"searches on one rank only, and there are {problem.ranks.count}; leave it at 0")
    later = later_steps if later_steps is not None else max(1, flow_steps // 2)
    if clones is not None:
        clones = validation.widths(clones, problem.architecture.depth, "clones", minimum=0)
    settings = {
        "tolerance": tolerance,
        "flow_steps": flow_steps,
        "later_steps": later,
        "batch_size": batch_size,
        "program_tolerance": program_tolerance or tolerance / 5,
        "program_iterations": program_iterations,
        "clones": clones,
        "grow": grow,
        "seed": seed,
    }
    file = states.of_run(state, settings, problem, network)
    run = _Run(
        problem,
        network,
        tolerance,
        batch_size,
        settings["program_tolerance"],
        program_iterations,
        clones,
        grow,
        math.inf if attained is None else attained,
        seed,
        callback,
        file,
        state_seconds,
    )
    if file is not None and (found := file.load(problem.inputs.device)) is not None:
        run.restore(found)
    flow.warn_unattained(problem)
    if prove and (reason := certificates.no_method(problem)):
        warnings.warn(f"nothing will be proven over all measures: {reason}", UserWarning, stacklevel=4)
    with limits.within(max_seconds), limits.memory(max_memory):
        memory.require(problem, network.widths, batch=batch_size, clones=clones, grow=grow, starts=CONFIRMING_STARTS)
        status = run.alternate(rounds, flow_steps, later)
        if prove:
            run.prove(prove, status)
        return run.solution(status)


def flow_state(state: Path) -> Path:
    """The file beside that of an alternation in which its flow keeps its own state."""
    return state.with_suffix(".flow.safetensors")


def proof_state(state: Path) -> Path:
    """That in which the proof of its last network keeps its own."""
    return state.with_suffix(".proof.safetensors")


class _Flowed(NamedTuple):
    """What a round remembers of its flow."""

    value: float
    drop: float
    speed: float
    steps: int


@dataclass
class _Run:
    problem: Problem
    network: ParticleNetwork
    tolerance: float
    batch_size: int | None
    program_tolerance: float
    program_iterations: int
    clones: Sequence[int] | None
    grow: int
    attained: float
    seed: int
    callback: Callable[[dict[str, Any]], None] | None
    file: StateFile | None
    state_seconds: float
    index: int = 0
    rate: float = field(default_factory=lambda: RATE)
    flowed: _Flowed | None = None  # of this round, once its flow has ended
    ended: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    best: Solution | None = None
    found: UnseenFeatures | None = None
    proven: ProvenBound | None = None
    began: float = field(default_factory=time.perf_counter)

    def alternate(self, rounds: int, first: int, later: int) -> str:
        """Round after round, the first with a flow of `first` steps; returns the status."""
        while self.ended is None and self.index < rounds:
            try:
                ended = self.round(later if self.index else first)
            except limits.STOPS as stop:  # outside the inner solvers, which catch their own
                if self.best is None:
                    raise
                ended = limits.status(stop)
            if ended in ENDED_EARLY:
                return ended
            self.ended = self._converged(self.history[-1])
            self.rate *= RATE_DECAY if self._moved(self.history[-1]) else RATE_CUT
            self.index += 1
            self.save()
        return self.ended or "max_rounds"

    def _converged(self, row: dict[str, Any]) -> str | None:
        """The status with which a round ends the alternation, if it does."""
        if self._search_converged(row):
            return "search_converged"
        small = self.decided(row["flow_gap"] <= self.tolerance * abs(row["flow_value"]))
        if not self.grow and small and (self._moved(row) or self.rate <= LEAST_RATE):
            return "alternation_converged"
        return None

    def _moved(self, row: dict[str, Any]) -> bool:
        return self.decided(row["flow_drop"] > 0)

    def decided(self, value: bool) -> bool:
        return self.problem.ranks.decided(value)

    def round(self, steps: int) -> str:
        """One flow and one convex program; returns the status that ended it early, or "done"."""
        if self.file is not None and self.problem.ranks.own == 0:  # a tree is of one network and its multipliers
            proof_state(self.file.path).unlink(missing_ok=True)
        if self.flowed is None and (ended := self._flow(steps)) in ENDED_EARLY:
            return ended
        program = self._program()
        solved = splitting.solve(
            program,
            self.program_tolerance,
            max_iterations=self.program_iterations,
            callback=self._relay("program"),
        )
        ended, growth = solved.status, NO_GROWTH if self.grow else {}
        if self.grow and ended not in ENDED_EARLY:
            try:
                growth = self._growth(program, solved)
            except limits.STOPS as stop:  # the program's answer is kept
                ended = limits.status(stop)
        with limits.grace(math.inf):  # what was found is kept, whatever the time
            self._close(program, solved, growth)
        return ended

    def _flow(self, steps: int) -> str:
        """The flow of a round; returns its status."""
        flowed = self._quietly(
            flow.solve,
            self.problem,
            self.network,
            steps=steps,
            step_size=self.rate,
            batch_size=self.batch_size,
            seed=self.seed + self.index,
            state=None if self.file is None else flow_state(self.file.path),
            state_seconds=self.state_seconds,
            callback=self._relay("flow"),
        )
        if self.best is None or self.decided(flowed.value < self.best.value):
            self.network, self.best = flowed.network, flowed
        if flowed.status not in ENDED_EARLY:
            first, last = flowed.history[0], flowed.history[-1]
            self.flowed = _Flowed(flowed.value, first["value"] - flowed.value, last["speed"], last["step"])
            self.save()
        return flowed.status

    def save(self) -> None:
        if self.file is not None:
            names = ("index", "rate", "flowed", "ended", "history")
            self.file.save(
                {name: getattr(self, name) for name in names}
                | {
                    "network": states.entries(self.network),
                    "best": None if self.best is None else self.best.state(),
                    "found": None if self.found is None else self.found.state(),
                    "proven": None if self.proven is None else self.proven.state(),
                    "seconds": time.perf_counter() - self.began,
                }
            )

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `save` wrote."""
        architecture = self.problem.architecture
        self.index, self.rate, self.ended, self.history = (
            state[name] for name in ("index", "rate", "ended", "history")
        )
        self.flowed = None if state["flowed"] is None else _Flowed(*state["flowed"])
        self.network = ParticleNetwork(architecture, **state["network"])
        self.best = None if state["best"] is None else Solution.restored(state["best"], architecture)
        self.found = None if state["found"] is None else UnseenFeatures.restored(state["found"], architecture)
        self.proven = None if state["proven"] is None else ProvenBound.restored(state["proven"])
        self.began -= state["seconds"]

    def _close(self, program: ConvexProgram, solved: Solution, growth: dict[str, Any]) -> None:
        """Accept the program's network if J, evaluated afresh, does not rise; write the round's row."""
        flowed, self.flowed = self.flowed, None
        assert self.best is not None
        assert flowed is not None
        assert solved.multipliers is not None
        accepted = self.decided(float(self.problem.value(solved.network)) <= self.best.value)
        if accepted:
            self.network, self.best = self._balanced(solved.network), solved
        else:  # the flow's network stays, with the better multipliers of the program frozen there
            point = program.point(program.frozen)
            certificate = certificates.certify(program, point, solved.multipliers)
            self.best = replace(
                self.best, certificate=certificate, gap=certificate.gap, point=point, multipliers=solved.multipliers
            )
        dual = solved.value - solved.gap
        row = {
            "round": self.index,
            "phase": "round",
            "seconds": time.perf_counter() - self.began,
            "rate": self.rate,
            "flow_drop": flowed.drop,
            **growth,
            "flow_value": flowed.value,
            "flow_speed": flowed.speed,
            "flow_gap": flowed.value - dual,
            "value": self.best.value,
            "dual_value": dual,
            "gap": solved.gap,
            "violation": solved.certificate.violation if solved.certificate else math.nan,
            "widths": list(self.network.widths),
            "accepted": accepted,
            "flow_steps": flowed.steps,
            "program_iterations": solved.history[-1]["iteration"] if solved.history else 0,
        }
        self.history.append(row)
        if self.callback is not None:
            self.callback(row)

    def _balanced(self, network: ParticleNetwork) -> ParticleNetwork:
        """In one homogeneous layer the frozen norms of kernels are no part of the problem: with power 2 the next round
        starts from the best.
        """
        penalty, only = self.problem.penalty, self.problem.architecture.layers[0]
        free = penalty.input > 0 and penalty.readout > 0 and penalty.input_bound is None
        if network.architecture.depth > 1 or not only.h.homogeneous or not free or penalty.power != 2:
            return network
        return measures.balance(network, penalty.input, penalty.readout)

    def _program(self) -> ConvexProgram:
        """The program of the present features, of perturbed clones and of what the last search found."""
        network = self.network
        if self.clones is not None:
            generator = torch.Generator().manual_seed(self.seed + 7919 * (self.index + 1))
            network = measures.extend(network, self.clones, CLONE_NOISE, generator)
        if self.found is None or self.found.features is None:
            return ConvexProgram.freeze(self.problem, network)
        return ConvexProgram.with_candidates(self.problem, network, self.found.features.to(dtype=network.dtype))

    def _growth(self, program: ConvexProgram, solved: Solution) -> dict[str, Any]:
        """Search for the next features with this program's multipliers; what became of the last ones."""
        assert self.best is not None
        assert solved.multipliers is not None
        added = 0 if self.found is None or self.found.features is None else self.found.features.widths[-1]
        alive = torch.nonzero(solved.point.masses[-1] > 0).flatten()  # the particles of solved.network, in order
        kept = torch.nonzero(alive >= program.widths[-1] - added).flatten().tolist()
        for starts in (STARTS, CONFIRMING_STARTS):  # what a small search leaves open, a large one has to confirm
            self.found = certificates.search_features(
                self.problem,
                solved.multipliers.output,
                solved.network,
                starts=starts,
                count=self.grow,
                seed=self.seed + len(self.history),
                attained=min(self.attained, self.best.value, solved.value),
            )
            if solved.value - self.found.bound > self.tolerance * abs(solved.value):
                break
        found = self.found
        figures = {
            "search_bound": found.bound,
            "search_starts": found.starts,
            "search_reached": found.reached,
            "unseen_chance": found.unseen_chance,
            "unseen_lowering": found.unseen_lowering,
            "refuted_bound": found.refuted,
            "proven_bound": found.rigorous_bound,
        }
        return {**figures, "added": added, "kept": kept}

    def _search_converged(self, row: dict[str, Any]) -> bool:
        if not self.grow or row["refuted_bound"] is not None:
            return False
        return row["value"] - row["search_bound"] <= self.tolerance * abs(row["value"])

    def _judged(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row whose bound has met the best J of the whole run."""
        assert self.best is not None
        if not self.grow:
            return row
        found = UnseenFeatures(row["search_bound"], row["search_starts"], refuted=row["refuted_bound"])
        found = found.below(min(self.attained, self.best.value), self.problem, self.network.widths)
        return {**row, "search_bound": found.bound, "refuted_bound": found.refuted}

    def prove(self, seconds: float, status: str) -> None:
        """Spend so many seconds on the proven bound, those of the run before a pause included."""
        assert self.best is not None
        if self.best.multipliers is None or status in ("interrupted", "out_of_memory"):
            return
        try:
            with limits.grace(math.inf):
                self.proven = certificates.prove(
                    self.problem,
                    self.best.multipliers.output,
                    self.best.network,
                    seconds,
                    self._relay("proof"),
                    before=self.proven,
                    state=None if self.file is None else proof_state(self.file.path),
                    state_seconds=self.state_seconds,
                )
        except limits.STOPS as stop:  # before anything was proven: the answer is kept
            limits.status(stop)
        self.save()

    def _relay(self, phase: str) -> Callable[[dict[str, Any]], None] | None:
        callback, index = self.callback, self.index
        if callback is None:
            return None
        return lambda row: callback({"round": index, "phase": phase, **row})

    def _quietly(self, function: Callable[..., Solution], *arguments: Any, **options: Any) -> Solution:
        """The flow warns of an unattained infimum; the outer loop has said so once."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the infimum over all measures")
            return function(*arguments, **options)

    def solution(self, status: str) -> Solution:
        best = self.best
        assert best is not None
        history = [self._judged(row) for row in self.history]
        bounds = [row["proven_bound"] for row in history if row.get("proven_bound") is not None]
        if self.proven is not None and not self.proven.reason:
            bounds.append(self.proven.value)
        detail = f"{len(self.history)} rounds, value {best.value:.8g}"
        detail += f", gap {best.gap:.2g} on this support" if best.certificate is not None else ""
        if self.history:
            detail += f", last flow within {self.history[-1]['flow_gap']:.2g} of its program's dual value"
        if self.found is not None:
            last = self.found.below(min(self.attained, best.value), self.problem, self.network.widths)
            detail += f"; {last.summary()}"
            added, kept = sum(row["added"] for row in self.history), sum(len(row["kept"]) for row in self.history)
            detail += f"; {added} features were added, {kept} of them kept mass"
            above = [row["refuted_bound"] for row in history if row["refuted_bound"] is not None]
            if above:
                detail += (
                    f"; WARNING: {len(above)} of {len(history)} searches gave bounds above a J that was reached, up to "
                    f"{max(above):.8g}: they missed features and bound nothing"
                )
        if self.proven is not None:
            detail += f"; {self.proven.summary()}"
        return Solution(
            value=best.value,
            gap=best.gap,
            status=status,
            message=message(status, detail, certified=best.certificate is not None),
            network=best.network,
            point=best.point,
            lower_bound=max(bounds, default=None),
            proven=self.proven,
            history=history,
            certificate=best.certificate,
            multipliers=best.multipliers,
            seconds=time.perf_counter() - self.began,
        )
