"""Proven lower bounds of J over all measures, and output multipliers chosen for them: one ReLU layer, or two layers of
tanh, erf or hard tanh (`two_layers`).

One ReLU layer: for multipliers r (N, K) in the domain of the loss conjugate and any upper bound U of max |q| over unit
kernels,

    q_z(r) = sum_n r_n phi_z(n),   phi_z(n) = mean over positions of relu(<z, patch>),

every network has J >= D(s r) = -(1/N) sum_n loss*(N s r_n) for 0 <= s <= price / U, price = 2 sqrt(lambda_1 lambda_u)
(`search`).  `sphere.maximise` finds U.  A kernel with |q| above the price is a feature that the support of r lacks.
Written as the cut <r, phi_z u> <= price, u = q / |q|, it is one more column of a small convex program:

    max D(r) over <r, G_c> <= price  =  min over a >= 0 of (1/N) sum_n loss(-sum_c a_c G_c(n)) + price sum_c a_c,

whose residuals are the next r (Kelley's cutting planes, J. SIAM 8, 1960).  Whatever r is tried, the bound at it is
proven, and the best is kept.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import InitVar, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from scipy.linalg import solve_triangular
from scipy.optimize import minimize, nnls
from torch import Tensor

from meanfield import limits, validation
from meanfield.architecture import Architecture
from meanfield.certificates import concave, sphere, two_layers, vectors
from meanfield.certificates.duality import feasible, largest_scale, mean_conjugate
from meanfield.certificates.relaxing import Partition
from meanfield.certificates.sphere.branching import alone
from meanfield.certificates.sphere.response import reduced, start_directions, unit, uphill
from meanfield.network import ParticleNetwork
from meanfield.problem import Problem
from meanfield.signatures import Nonnegative, Seconds, checked
from meanfield.storage import states, tensors
from meanfield.storage.states import StateFile
from meanfield.validation import path

EXACT_ENTRIES = 3  # of a kernel, up to which the maximum is exact and takes little time
LEAST_SECONDS = 2.0  # of one bound
SLICE, LEAST_SLICE = 1.0, 0.1  # seconds of branch and bound between two looks at the clock and at interrupts
SAVING = 0.02  # of the time may go into writing the state
MOVED = 1.0  # of the time that multipliers have, up to which cells of the last ones are bounded anew
FIRST = 1 / 12  # of the time is for the first bound of `prove`; each later one takes twice as long as all before it
VIOLATED = 1e-6  # relative to the price: what a cut is added for
CLOSED = 3e-7  # relative to the program's value: what the bound need not rise any more
NEAR = 0.9  # of the price: what is cut beforehand
PASSES = 24  # of cuts between two bounds
STEPS = 40  # of the ascents that look for cuts, from ASCENTS kernels
ASCENTS = 256
APART = 0.05  # between unit kernels that are added at once
RELAXED_PASSES, RELAXED_CELLS = 12, 2000
RELAXED_CLOSED = 2e-3  # relative to the value of the program with relaxed features: what need not be gained any more
RELAXED_SHARE = 0.2  # of the time left
STAY = 0.7  # of a step from the best multipliers towards those of the program
MOST_ENTRIES = 1 << 24  # of the patches by images
ITERATIONS = 100  # of L-BFGS-B
NEWTON_STEPS, NEWTON_HALVINGS, NEWTON_TOLERANCE, RIDGE = 20, 20, 1e-10, 1e-13


@dataclass(frozen=True, eq=False)
class ProvenBound:
    """J >= value for every network, proven.

    share: value over the J of the network in hand.  curve: (seconds, value) whenever the bound rose, nondecreasing.
    kind: the method, and what it knows of max |q|.  output (N, K): the multipliers that attain it, scaled.  kernels
    (m, d): unit kernels, bias included, that the network lacked.  Where no method applies value is -inf and `reason`
    says why.
    """

    value: float
    share: float = 0.0
    curve: tuple[tuple[float, float], ...] = ()
    kind: str = ""
    output: Tensor | None = None
    kernels: Tensor | None = None
    seconds: float = 0.0
    reason: str = ""

    def summary(self) -> str:
        """One line."""
        if self.reason:
            return f"nothing is proven over all measures: {self.reason}"
        return f"J >= {self.value:.8g} for every network, proven: {self.share:.2%} of J ({self.kind})"

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        kept = ("value", "share", "kind", "seconds", "reason")
        curve = [list(point) for point in self.curve]
        return {name: getattr(self, name) for name in kept if not self.reason} | {"curve": curve, "reason": self.reason}

    def state(self) -> dict[str, Any]:
        """For a `StateFile`."""
        return dict(vars(self))

    @classmethod
    def restored(cls, state: dict[str, Any]) -> ProvenBound:
        """What `state` described."""
        return cls(**{**state, "curve": tuple((float(at), float(value)) for at, value in state["curve"])})


def no_method(problem: Problem) -> str:
    """Why `prove` has no method for a problem; empty where it has one."""
    arch, penalty = problem.architecture, problem.penalty
    if penalty.uncertified is not None:
        return "the penalty has a term that nothing is proven of"
    if problem.ranks.count > 1:
        return "the images are shared among processes"
    if arch.depth > 1:
        return two_layers.unfit(problem)
    conv = arch.layers[0]
    reasons = {
        f"there is a method for ReLU only, not for {conv.h.name}": conv.h.name != "relu",
        "there is no method for maximum pooling": conv.pooling == "max",
        "there is a method for the average readout only": arch.readout != "average",
        "there is no method with an input bound": penalty.input_bound is not None,
        "there is a method for power 2 only": penalty.power != 2,
        "without penalties on input and readout features cost nothing": penalty.input * penalty.readout == 0,
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


@checked
@torch.inference_mode(False)
def prove(
    problem: Problem,
    output: Tensor,
    network: ParticleNetwork,
    seconds: Nonnegative,
    callback: Callable[[dict[str, Any]], None] | None = None,
    *,
    before: ProvenBound | None = None,
    state: Annotated[str | Path, path] | None = None,
    state_seconds: Seconds = states.STATE_SECONDS,
) -> ProvenBound:
    """The best lower bound of J over all measures that `seconds` prove, from the multipliers r = `output` (N, K) on.

    network: its features are the first of the small program, its J that of the share.  The first bound is at r; then
    features that r undercharges, the next r, its bound, in turn, each bound with twice the time that has gone, or with
    all that is left where the one before is far from closed.  It ends early where the bound reaches the program's
    value.  Ctrl-C and a limit of time (`limits.within`) end it with what is proven by then.  before: an earlier answer,
    to go on from; its seconds count.
    state: file (.safetensors) to which what is proven and the tree of the branch and bound are written every
    `state_seconds` seconds, less often where writing would take more than SAVING of the time, and at the end.  A call
    with the same problem, multipliers and network goes on from there, whatever `before`, as if it had not ended: with
    the same tree, and with as many more seconds as `seconds` is larger.  Of two layers r is kept, but no tree.  The
    file stays, for the caller to remove; one that is damaged or of another proof is refused (ValueError).
    callback: hears {"phase": "proof", "seconds", "bound", "share"} after every bound.
    """
    problem.require_whole("prove")
    shape = len(problem.inputs), problem.architecture.outputs
    output = validation.finite(validation.shaped(output, shape, "output"), "output").detach()
    reason = no_method(problem)
    if reason:
        return ProvenBound(-math.inf, reason=reason)
    settings = {"work": "proof", "multipliers": tensors.digest([output])[: states.DIGITS]}
    file = states.of_run(state, settings, problem, network)
    kept = None if file is None else file.load(problem.inputs.device)
    before = before if kept is None else ProvenBound.restored(kept["best"])
    problem, network = problem.to(dtype=torch.float64), network.to(dtype=torch.float64)
    output = feasible(problem, output.to(problem.inputs))
    make = _OneLayerProof if problem.architecture.depth == 1 else _TwoLayerProof
    proof = make(problem, network, seconds, callback, file, state_seconds, before)
    if kept is not None:
        proof.restore(kept)
    try:
        proof.run(output)
    except (KeyboardInterrupt, limits.TimeUp):
        if not proof.best.curve:
            raise
    proof.save()
    return proof.answer()


def at_multipliers(
    problem: Problem, output: Tensor, network: ParticleNetwork | None, seconds: float
) -> dict[str, float | str | None]:
    """The proven bound at r = `output`, scaled: what `search_features` reports of it; {} where no method applies, or
    no time was given to one that needs it.
    """
    if problem.architecture.depth > 1 or no_method(problem):
        return {}
    if seconds <= 0 and _entries(problem.architecture) > EXACT_ENTRIES:
        return {}
    features = Features.of(problem)
    start = None if network is None else vectors.kernels(network)
    found = _bound(problem, features, output, start, max(seconds, LEAST_SECONDS))
    return {"rigorous_bound": found.value, "rigorous_kind": found.kind}


@dataclass(frozen=True, eq=False)
class Features:
    """phi_z(n) of all kernels: patches (N P, d) with 1 for a bias, weights (P,) of the positions in the readout."""

    patches: Tensor
    weights: Tensor

    @classmethod
    def of(cls, problem: Problem) -> Features:
        patches = vectors.patches(problem).flatten(0, 1)
        return cls(patches, vectors.position_weights(problem.architecture).to(patches))

    def __call__(self, kernels: Tensor) -> Tensor:
        """phi (m, N) of kernels (m, d)."""
        count = self.patches.shape[1]
        size = max(1, limits.block_bytes() // (8 * len(self.patches)))
        rows = [
            (self.patches @ part.T).clamp_min_(0).view(-1, len(self.weights), len(part)) for part in kernels.split(size)
        ]
        found = [torch.einsum("npm,p->mn", row, self.weights) for row in rows]
        return torch.cat(found) if found else self.patches.new_zeros(0, len(self.patches) // count)

    def weighted(self, output: Tensor) -> Tensor:
        """Weights (N P, K) of all patches in q at r = output (N, K)."""
        return (output[:, None] * self.weights[None, :, None]).flatten(0, 1)


@dataclass(frozen=True, eq=False)
class _Bounded:
    """The bound at some multipliers: its value, and what is known of max |q|."""

    value: float
    kind: str
    output: Tensor
    maximum: sphere.SphereMaximum


def _bound(problem: Problem, features: Features, output: Tensor, start: Tensor | None, seconds: float) -> _Bounded:
    """r scaled by at most the price over an upper bound of max |q|, to the best of it."""
    found = sphere.maximise(features.patches, features.weighted(output), max_seconds=seconds, start=start)
    return _at(problem, output, found)


def _at(problem: Problem, output: Tensor, found: sphere.SphereMaximum) -> _Bounded:
    limit = min(_price(problem) / found.upper if found.upper > 0 else math.inf, largest_scale(problem.loss))
    scale, value = concave.maximum(lambda s: _dual(problem, s * output), limit)
    kind = f"{found.method}, max |q| between {found.lower:.6g} and {found.upper:.6g}"
    return _Bounded(value, kind, scale * output, found)


def _dual(problem: Problem, output: Tensor) -> float:
    return 0.0 - float(mean_conjugate(problem, output))  # 0 has no sign


def _price(problem: Problem) -> float:
    """What a unit kernel of unit readout costs at the best masses and scales."""
    return 2 * math.sqrt(problem.penalty.input * problem.penalty.readout)


def _entries(architecture: Architecture) -> int:
    conv = architecture.layers[0]
    return architecture.input_shape[0] * conv.offsets + conv.bias


@dataclass
class _Program:
    """The convex program over known kernels, by cuts <r, phi u> <= price: kernels (m, d), cuts (C, N, K).

    amounts (C,): a, of the last solution.  value: its value, which no bound over all measures exceeds.
    """

    problem: Problem
    features: Features
    kernels: Tensor
    phi: Tensor = field(init=False)
    cuts: Tensor = field(init=False)
    amounts: np.ndarray = field(init=False)
    value: float = math.inf

    def __post_init__(self) -> None:
        self.phi = self.features(self.kernels)
        self.cuts = self.phi.new_zeros(0, len(self.problem.inputs), self.problem.architecture.outputs)
        self.amounts = np.zeros(0)

    def add(self, kernels: Tensor) -> None:
        self.kernels = torch.cat([self.kernels, kernels])
        self.phi = torch.cat([self.phi, self.features(kernels)])

    def cut(self, output: Tensor, level: float) -> bool:
        """Add the cuts of all known kernels with |q| above a level; whether there are any."""
        q = self.phi @ output
        lengths = q.norm(dim=1)
        over = (lengths > level).nonzero()[:, 0]
        directions = q[over] / lengths[over, None]
        self.extend(self.phi[over, :, None] * directions[:, None, :])
        return len(over) > 0

    def _forget(self, output: Tensor, level: float) -> None:
        """Drop the cuts that count for nothing and are not near."""
        kept = (self.amounts > 0) | (torch.tensordot(self.cuts, output, 2).numpy(force=True) > level)
        self.cuts, self.amounts = self.cuts[torch.from_numpy(kept).to(self.cuts.device)], self.amounts[kept]

    def extend(self, cuts: Tensor) -> None:
        """Add cuts (c, N, K)."""
        self.cuts = torch.cat([self.cuts, cuts])
        self.amounts = np.concatenate([self.amounts, np.zeros(len(cuts))])

    def solve(self, output: Tensor) -> Tensor:
        """The multipliers (N, K) that are best for the known kernels, from `output` on."""
        price = _price(self.problem)
        self._forget(output, NEAR * price)
        self.cut(output, NEAR * price)
        for _ in range(PASSES):
            output = self._of_cuts()
            if not self.cut(output, price * (1 + VIOLATED)):
                break
        return output

    def _of_cuts(self) -> Tensor:
        """Those of the cuts at hand: the residuals of the program over a >= 0."""
        if len(self.amounts):
            self._descend()
            self._polish()
        self.value = self._value(self.amounts)[0]
        slopes = self.problem.loss.gradient(self._outputs(self.amounts), self.problem.targets)
        return self.problem.loss.feasible(slopes, self.problem.targets) / self.problem.count

    def _descend(self) -> None:
        size = max(self._value(np.zeros(len(self.amounts)))[0], np.finfo(float).tiny)

        def scaled(amounts: np.ndarray) -> tuple[float, np.ndarray]:
            value, slopes = self._value(amounts)
            return value / size, slopes / size

        options = {"maxiter": ITERATIONS, "ftol": 1e-15, "gtol": 0.0, "maxcor": 30}
        bounds = [(0.0, None)] * len(self.amounts)
        self.amounts = minimize(scaled, self.amounts, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x

    def _outputs(self, amounts: np.ndarray) -> Tensor:
        return -torch.tensordot(torch.from_numpy(amounts).to(self.cuts), self.cuts, 1)

    def _value(self, amounts: np.ndarray) -> tuple[float, np.ndarray]:
        """The program's value and its slopes (C,)."""
        limits.look()
        problem, price, F = self.problem, _price(self.problem), self._outputs(amounts)
        loss = float(problem.loss.value(F, problem.targets).mean())
        slopes = torch.tensordot(self.cuts, problem.loss.gradient(F, problem.targets), 2) / problem.count
        return loss + price * float(amounts.sum()), price - slopes.numpy(force=True)

    def _polish(self) -> None:
        """Newton steps, each a least-squares problem over a >= 0 (Lawson and Hanson, 1974): cuts are nearly parallel,
        and the first order leaves r short of what proves the last thousandth.  Without curvature, as of a hinge, there
        are none.
        """
        value, slopes = self._value(self.amounts)
        for _ in range(NEWTON_STEPS):
            curved = self._curvature()
            ridge = RIDGE * np.trace(curved)
            if ridge == 0:
                return
            root = np.linalg.cholesky(curved + ridge * np.eye(len(curved)))
            linear = slopes - curved @ self.amounts - ridge * self.amounts
            step = nnls(root.T, -solve_triangular(root, linear, lower=True))[0] - self.amounts
            if -float(slopes @ step) <= NEWTON_TOLERANCE * value:
                return
            for halving in range(NEWTON_HALVINGS):
                amounts = self.amounts + 0.5**halving * step
                reached, there = self._value(amounts)
                if reached < value:
                    break
            else:
                return
            self.amounts, value, slopes = amounts, reached, there

    def _curvature(self) -> np.ndarray:
        """The second derivative of the mean loss in the amounts, (C, C)."""
        cuts = self.cuts
        F = self._outputs(self.amounts).requires_grad_()
        (slopes,) = torch.autograd.grad(self.problem.loss.value(F, self.problem.targets).sum(), F, create_graph=True)
        if not slopes.requires_grad:
            return np.zeros((len(cuts), len(cuts)))
        rows = [torch.autograd.grad(each, F, retain_graph=True, materialize_grads=True)[0] for each in slopes.sum(0)]
        weighted = torch.einsum("cnk,nkl->cnl", cuts, torch.stack(rows, 1))
        return (weighted.flatten(1) @ cuts.flatten(1).T).numpy(force=True) / self.problem.count


def _relaxed(program: _Program, output: Tensor, partition: Partition, passes: int) -> Iterator[Tensor]:
    """Multipliers near the best on a partition, pass by pass, from `output` on: steps from the best so far towards
    those of the program with the relaxed features of all passes, whose value no multipliers exceed there.
    """
    problem, price = program.problem, _price(program.problem)
    program, best = copy.copy(program), (-math.inf, output)
    for _ in range(passes):
        limits.look()
        upper, relaxed = partition.bound(output)
        scale, value = concave.maximum(
            lambda s, r=output: _dual(problem, s * r), min(price / upper, largest_scale(problem.loss))
        )
        best = max(best, (value, scale * output), key=lambda each: each[0])
        yield best[1]
        program.extend(relaxed)
        towards = program.solve(output)
        if best[0] >= program.value * (1 - RELAXED_CLOSED):
            return
        output = STAY * best[1] + (1 - STAY) * towards


@dataclass
class _Proof:
    """The best bound so far, and the file that keeps it."""

    problem: Problem
    network: ParticleNetwork
    seconds: float
    callback: Callable[[dict[str, Any]], None] | None
    file: StateFile | None
    state_seconds: float
    before: InitVar[ProvenBound | None]

    def __post_init__(self, before: ProvenBound | None) -> None:
        self.value = float(self.problem.value(self.network))
        self.best = ProvenBound(-math.inf) if before is None else replace(before, share=before.value / self.value)
        self.began = time.perf_counter() - self.best.seconds
        self.saved, self.cost = time.perf_counter(), 0.0

    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def answer(self) -> ProvenBound:
        return replace(self.best, seconds=self.elapsed())

    def keep(self, value: float, kind: str, output: Tensor) -> None:
        """Take a bound if it is the best, and say how far the proof is."""
        if value > self.best.value:
            curve = (*self.best.curve, (self.elapsed(), value))
            self.best = replace(self.best, value=value, share=value / self.value, curve=curve, kind=kind, output=output)
        if self.callback is not None:
            figures = {"seconds": self.elapsed(), "bound": self.best.value, "share": self.best.share}
            self.callback({"phase": "proof", **figures})
        self.save_in_time()

    def save_in_time(self) -> None:
        if time.perf_counter() - self.saved >= max(self.state_seconds, self.cost / SAVING):
            self.save()

    def save(self) -> None:
        if self.file is None:
            return
        began = time.perf_counter()
        self.file.save(self.state())
        self.saved = time.perf_counter()
        self.cost = self.saved - began

    def state(self) -> dict[str, Any]:
        return {"best": self.answer().state()}

    def restore(self, state: dict[str, Any]) -> None:
        """What `state` knows beside the best bound."""


class _TwoLayerProof(_Proof):
    """Two saturating layers: a quick bound at r, then one at multipliers chosen for it; later ones at the best r."""

    def run(self, output: Tensor) -> None:
        mu = None
        if not self.best.curve:
            first = self._bounded(output, FIRST * self.seconds, 0)
            output, mu = first.output, first.mu
        if self.elapsed() >= self.seconds:
            return
        chosen = len(self.best.curve) > 1
        output = self.best.output if chosen and self.best.output is not None else output
        self._bounded(output, self.seconds - self.elapsed(), 0 if chosen else two_layers.STEPS, mu)

    def _bounded(self, output: Tensor, seconds: float, steps: int, mu: float | None = None) -> two_layers.TwoLayerBound:
        found = two_layers.prove(self.problem, output, self.network, seconds=seconds, steps=steps, mu=mu)
        low, high = found.gain.lower, found.gain.upper
        kind = f"two layers, the gain of a kernel between {low:.6g} and {high:.6g}"
        self.keep(found.bound, kind, found.output)
        return found


class _Tree(NamedTuple):
    """A branch and bound at the multipliers output (N, K).

    began: at which second of the proof; the first one at 0.  led: whether relaxed features have led to its multipliers.
    last: whether all the time left is given to it.
    """

    output: Tensor
    search: sphere.Search
    began: float
    led: bool
    last: bool


class _Ahead(NamedTuple):
    """Multipliers (N, K) for the next tree: the best of so many passes."""

    output: Tensor
    passes: int


class _OneLayerProof(_Proof):
    """One ReLU layer: bounds in turn with multipliers of a program that knows more and more features."""

    tree: _Tree | None
    ahead: _Ahead | None

    def __post_init__(self, before: ProvenBound | None) -> None:
        super().__post_init__(before)
        self.features = Features.of(self.problem)
        own = unit(vectors.kernels(self.network))
        lacked = own[:0] if self.best.kernels is None else self.best.kernels.to(own)
        self.own, self.tree, self.ahead = len(own), None, None
        self.program = _Program(self.problem, self.features, torch.cat([own, lacked]))

    def state(self) -> dict[str, Any]:
        tree = self.tree and {**self.tree._asdict(), "search": self.tree.search.state()}
        return {**super().state(), "tree": tree, "ahead": self.ahead and self.ahead._asdict()}

    def restore(self, state: dict[str, Any]) -> None:
        self.ahead = state["ahead"] and _Ahead(**state["ahead"])
        if (tree := state["tree"]) is None:
            return
        given = self.features.patches, self.features.weighted(tree["output"])
        try:
            self.tree = _Tree(**{**tree, "search": sphere.Search.restored(*given, tree["search"])})
        except validation.Misuse as error:
            assert self.file is not None
            remedy = f"cannot be used: its tree {error.remedy}; delete it to start anew"
            raise validation.Misuse("state", str(self.file.path), remedy) from error

    def run(self, output: Tensor) -> None:
        if self.best.curve and self.elapsed() >= self.seconds:
            return
        if self.ahead is not None:
            output = self._led(*self.ahead)
        elif self.tree is not None:
            output = self.tree.output
        elif self.best.curve:  # the bound at r is known
            output = self.program.solve(output)
        while not self.best.curve or self.elapsed() < self.seconds:  # however little time there is, something is proven
            maximum = self._bounded(output)
            if self.elapsed() >= self.seconds:
                break
            proposed = self._next(output, maximum)
            if self.best.value >= self.program.value * (1 - CLOSED):
                break
            relaxes = self.tree is not None and self._smooths() and (self.tree.led or not self._closes(self.tree))
            output = self._led(output, 0) if relaxes else proposed

    def _closes(self, tree: _Tree) -> bool:
        """Whether the time left closes a tree, at the rate at which the last doubling of its time lowered its bound."""
        known, curve = tree.search.maximum, tree.search.curve
        earlier = [upper for seconds, upper in curve if 2 * seconds <= known.seconds] or [curve[0][1]]
        doublings = math.log2(1 + max(self.seconds - self.elapsed(), 0.0) / known.seconds)
        return known.upper - doublings * (earlier[-1] - known.upper) <= known.lower

    def _smooths(self) -> bool:
        """Whether there are multipliers of which more can be proven."""
        few = len(self.problem.inputs) * len(self.features.patches) <= MOST_ENTRIES
        return self.problem.architecture.outputs == 1 and few

    def _led(self, output: Tensor, passes: int) -> Tensor:
        """By relaxed features of the tree, from multipliers that so many passes have led to."""
        assert self.tree is not None
        deadline = time.perf_counter() + RELAXED_SHARE * (self.seconds - self.elapsed())
        self.ahead = _Ahead(output, passes)
        partition = Partition.of(self.features.patches, self.features.weights, self.tree.search, RELAXED_CELLS)
        left = _relaxed(self.program, output, partition, RELAXED_PASSES - passes)
        with alone():
            for done, best in enumerate(left, passes + 1):
                self.ahead = _Ahead(best, done)
                self.save_in_time()
                if time.perf_counter() > deadline:
                    break
        return self.ahead.output

    def _bounded(self, output: Tensor) -> sphere.SphereMaximum:
        """Bound at some multipliers, and keep it if it is the best."""
        return self._exact(output) or self._searched(output)

    def _given(self, tree: _Tree) -> float:
        """Seconds for a tree."""
        left, slice_ = self.seconds - tree.began, 2 * tree.began if tree.began else FIRST * self.seconds
        # begun anew with less time than the last it would hardly be better; far from closed it is time that it lacks
        given = left if tree.began and (left < 4 * slice_ or tree.last) else min(left, slice_)
        return max(given, LEAST_SLICE)

    def _exact(self, output: Tensor) -> sphere.SphereMaximum | None:
        """At once, where planes are few."""
        limits.look()
        if _entries(self.problem.architecture) > EXACT_ENTRIES:
            return None
        found = _bound(self.problem, self.features, output, self.program.kernels, LEAST_SECONDS)
        self.keep(found.value, found.kind, found.output)
        return found.maximum

    def _searched(self, output: Tensor) -> sphere.SphereMaximum:
        """By branch and bound, heard of every SLICE."""
        if self.tree is None or self.tree.output is not output:
            self.tree, self.ahead = self._planted(output), None
        search, end = self.tree.search, self.tree.began + self._given(self.tree)
        while True:
            before = search.maximum.cells
            maximum = search.refine(max(min(SLICE, end - self.elapsed()), LEAST_SLICE))
            found = _at(self.problem, output, maximum)
            self.keep(found.value, found.kind, found.output)
            if maximum.cells == before or self.elapsed() >= end:
                return maximum
            limits.look()

    def _planted(self, output: Tensor) -> _Tree:
        """From the cells of the last multipliers where it pays."""
        began = self.elapsed() if self.best.curve else 0.0
        given, known = (self.features.patches, self.features.weighted(output)), self.program.kernels
        if self.tree is None:
            return _Tree(output, sphere.Search(*given, start=known), began, False, False)
        last = not self._smooths() and not self._closes(self.tree)
        moved = self.tree.search.maximum.seconds <= MOVED * max(self.seconds - began, 0.0)
        search = self.tree.search.moved(*given, start=known) if moved else sphere.Search(*given, start=known)
        return _Tree(output, search, began, self.ahead is not None, last)

    def _next(self, output: Tensor, maximum: sphere.SphereMaximum) -> Tensor:
        """The multipliers of the program with the features that those of before undercharge."""
        self.program.add(maximum.argmax[None])
        for _ in range(PASSES):
            output = self.program.solve(output)
            found = self._undercharged(output)
            if not len(found) or self.elapsed() >= self.seconds:
                break
            self.program.add(found)
        self.best = replace(self.best, kernels=self.program.kernels[self.own :])
        return output

    def _undercharged(self, output: Tensor) -> Tensor:
        """Unit kernels (m, d) that gain more than the price, where ascents from several ones end; no two alike."""
        limits.look()
        price = _price(self.problem)
        response = reduced(self.features.patches, self.features.weighted(output))
        if not response.linear.shape[0]:
            return self.program.kernels[:0]
        known = self.program.kernels @ response.basis
        starts = start_directions(response, known)
        lengths = response(starts).norm(dim=1)
        directions = starts[lengths.topk(min(ASCENTS, len(starts))).indices]
        best, where = torch.zeros_like(directions[:, 0]), directions
        for step in range(STEPS):
            values = response(directions)
            lengths = values.norm(dim=1)
            where = torch.where((lengths > best)[:, None], directions, where)
            best = torch.maximum(lengths, best)
            directions = uphill(response, directions, values, 0.8 ** max(0, step - STEPS // 4))
        order = best.argsort(descending=True)
        order = order[best[order] > price * (1 + VIOLATED)]
        return _distinct(where[order]) @ response.basis.T


def _distinct(kernels: Tensor) -> Tensor:
    """Of unit kernels, best first, those with no better one near."""
    near = torch.cdist(kernels, kernels) < APART
    return kernels[~near.tril(-1).any(1)]
