"""The proof for one ReLU layer: bounds in turn at multipliers of which more and more can be proven.

For multipliers r (N, K) in the domain of the loss conjugate and any upper bound U of max |q| over unit kernels,

    q_z(r) = sum_n r_n phi_z(n),   phi_z(n) = mean over positions of relu(<z, patch>),

every network has J >= D(s r) = -(1/N) sum_n loss*(N s r_n) for 0 <= s <= price / U, price = 2 sqrt(lambda_1 lambda_u)
(`search`).  `sphere` finds U.  A kernel with |q| above the price is a feature that the support of r lacks: one more cut
of the program whose residuals are the next r (`cuts`).  Where the branch and bound will not close, relaxed features of
its own cells lead to multipliers of which it proves more (`relaxing`).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from meanfield import limits, validation
from meanfield.architecture import Architecture
from meanfield.certificates import sphere, vectors
from meanfield.certificates.cuts import VIOLATED, Features, Program, best_scale
from meanfield.certificates.duality import price_of
from meanfield.certificates.proof import FIRST, Proof, ProvenBound
from meanfield.certificates.relaxing import Partition, relaxed_passes
from meanfield.certificates.sphere.branching import alone
from meanfield.certificates.sphere.response import reduced, start_directions, unit, uphill
from meanfield.problem import Problem

EXACT_ENTRIES = 3  # of a kernel, up to which the maximum is exact and takes little time
LEAST_SECONDS = 2.0  # of one bound
SLICE, LEAST_SLICE = 1.0, 0.1  # seconds of branch and bound between two looks at the clock and at interrupts
CLOSED = 3e-7  # relative to the program's value: what the bound need not rise any more
PASSES = 24  # of the program between two bounds
STEPS = 40  # of the ascents that look for cuts, from ASCENTS kernels
ASCENTS = 256
APART = 0.05  # between unit kernels that are added at once
RELAXED_PASSES, RELAXED_CELLS = 12, 2000
RELAXED_SHARE = 0.2  # of the time left
MOST_ENTRIES = 1 << 24  # of the patches by images


def unfit(problem: Problem) -> str:
    """Why there is no such proof for one layer; empty where there is one."""
    penalty, conv = problem.penalty, problem.architecture.layers[0]
    reasons = {
        f"there is a method for ReLU only, not for {conv.h.name}": conv.h.name != "relu",
        "there is no method for maximum pooling": conv.pooling == "max",
        "there is a method for the average readout only": problem.architecture.readout != "average",
        "there is no method with an input bound": penalty.input_bound is not None,
        "there is a method for power 2 only": penalty.power != 2,
        "without penalties on input and readout features cost nothing": penalty.input * penalty.readout == 0,
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


@dataclass(frozen=True, eq=False)
class Bounded:
    """The bound at some multipliers: its value, and what is known of max |q|."""

    value: float
    kind: str
    output: Tensor
    maximum: sphere.SphereMaximum


def bound(problem: Problem, features: Features, output: Tensor, start: Tensor | None, seconds: float) -> Bounded:
    """r scaled by at most the price over an upper bound of max |q|, to the best of it."""
    found = sphere.maximise(features.patches, features.weighted(output), max_seconds=seconds, start=start)
    return _at(problem, output, found)


def _at(problem: Problem, output: Tensor, found: sphere.SphereMaximum) -> Bounded:
    scale, value = best_scale(problem, output, found.upper)
    kind = f"{found.method}, max |q| between {found.lower:.6g} and {found.upper:.6g}"
    return Bounded(value, kind, scale * output, found)


def entries(architecture: Architecture) -> int:
    conv = architecture.layers[0]
    return architecture.input_shape[0] * conv.offsets + conv.bias


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


class OneLayerProof(Proof):
    """One ReLU layer: bounds in turn with multipliers of a program that knows more and more features."""

    tree: _Tree | None
    ahead: _Ahead | None

    def __post_init__(self, before: ProvenBound | None) -> None:
        super().__post_init__(before)
        self.features = Features.of(self.problem)
        own = unit(vectors.kernels(self.network))
        lacked = own[:0] if self.best.kernels is None else self.best.kernels.to(own)
        self.own, self.tree, self.ahead = len(own), None, None
        self.program = Program(self.problem, self.features, torch.cat([own, lacked]))

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
        partition = Partition.of(self.features, self.tree.search, RELAXED_CELLS)
        left = relaxed_passes(self.program, output, partition, RELAXED_PASSES - passes)
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
        if entries(self.problem.architecture) > EXACT_ENTRIES:
            return None
        found = bound(self.problem, self.features, output, self.program.kernels, LEAST_SECONDS)
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
        moved = self.tree.search.maximum.seconds <= max(self.seconds - began, 0.0)  # else bounding anew takes it all
        search = self.tree.search.moved(*given, start=known) if moved else sphere.Search(*given, start=known)
        return _Tree(output, search, began, self.ahead is not None, last)

    def _next(self, output: Tensor, maximum: sphere.SphereMaximum) -> Tensor:
        """The multipliers of the program with the features that those of before undercharge."""
        self.program.add(maximum.argmax[None])
        with alone():
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
        price = price_of(self.problem)
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
