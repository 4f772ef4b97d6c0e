"""The convex program over populations of frozen features: value, violation, constraint basis, restoration."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from meanfield import limits, measures
from meanfield.convex import repopulation
from meanfield.convex.basis import ConstraintBasis, Design
from meanfield.convex.repopulation import ProgramPoint
from meanfield.convex.restoration import BoundedRows, into_bounds, least_weighted, towards
from meanfield.network import ParticleNetwork, along_axis
from meanfield.penalties import perspective
from meanfield.problem import FEASIBLE, Problem, Terms
from meanfield.signatures import checked
from meanfield.validation import instance

RESTORE_SWEEPS = 4
REVIVED_SHARES = (1.0, 1e-2, 1e-4)  # of the violation that the lack of sources leaves


@dataclass(frozen=True, eq=False)
class ConvexProgram:
    """minimise over (p, W, U, B) at frozen features  mean loss + perspectives of the penalties,

        subject to  sum_i sum_s W_ijs T_s f_i + B_j = p_j g_j  on every image and position, for layers >= 2,
        p >= 0, sum p = 1, and the amplitude bound  sum_i |W_ij| <= B p_j, |B_j| <= B p_j  where it is on.

    Fang et al. 2019, section 4.  Features of zero mass in the frozen network are candidates.
    """

    problem: Problem
    frozen: ParticleNetwork
    features: tuple[Tensor, ...]
    preactivations: tuple[Tensor, ...]

    @classmethod
    @checked
    def freeze(cls, problem: Problem, network: ParticleNetwork) -> ConvexProgram:
        """Freeze the features that `network` computes on the problem's inputs."""
        problem.require_feasible(network)
        network = network.detach()
        with torch.no_grad():
            responses = network.responses(problem.inputs)
            problem.require_finite(problem.terms(network, responses.output).total())
        return cls(problem, network, tuple(responses.features), tuple(responses.preactivations))

    @classmethod
    @checked
    def with_candidates(cls, problem: Problem, network: ParticleNetwork, candidates: ParticleNetwork) -> ConvexProgram:
        """Freeze the features of `network`, and those of `candidates` beside them at zero mass.

        A candidate of a later layer stands on lower candidates without mass: its features are those it has in the
        network `candidates`, where they do have mass.  Its readout is not used.
        """
        own, other = cls.freeze(problem, network), cls.freeze(problem, candidates)
        return cls(
            problem,
            measures.adjoin(own.frozen, other.frozen),
            tuple(torch.cat(pair, 1) for pair in zip(own.features, other.features)),
            tuple(torch.cat(pair, 1) for pair in zip(own.preactivations, other.preactivations)),
        )

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> ConvexProgram:
        convert = lambda tensor: tensor.to(dtype=dtype, device=device)  # noqa: E731
        return ConvexProgram(
            self.problem.to(dtype=dtype, device=device),
            self.frozen.map(convert),
            tuple(map(convert, self.features)),
            tuple(map(convert, self.preactivations)),
        )

    @property
    def depth(self) -> int:
        return self.problem.architecture.depth

    @property
    def widths(self) -> tuple[int, ...]:
        return self.frozen.widths

    @cached_property
    def feature_costs(self) -> Tensor:
        """lambda_1 |(z_i, b_i)|^2, (M_1,)."""
        cost = self.frozen.kernels[0].flatten(1).square().sum(1)
        if self.frozen.biases[0] is not None:
            cost = cost + self.frozen.biases[0].square()
        return self.problem.penalty.input * cost

    @cached_property
    def readout_features(self) -> Tensor:
        """What the readout multiplies, (N, M_L) or (N, M_L, positions)."""
        return self.problem.architecture.readout_features(self.features[-1])

    def design(self, layer: int) -> Design:
        """A of `layer` (counted from 0, >= 1)."""
        return Design(self.problem.architecture.layers[layer], self.features[layer - 1])

    def basis(self, layer: int) -> ConstraintBasis:
        """The constraint basis of `layer`, computed once."""
        if layer not in self._bases:
            self._bases[layer] = self.design(layer).basis()
        return self._bases[layer]

    @cached_property
    def _bases(self) -> dict[int, ConstraintBasis]:
        return {}

    def point(self, network: ParticleNetwork) -> ProgramPoint:
        """The program variables of the frozen network, or of any network with the same features."""
        instance(network, "network", ParticleNetwork)
        if network.widths != self.widths or network.architecture != self.problem.architecture:
            raise ValueError(
                f"the network has widths {network.widths}; the program froze the features of widths {self.widths}"
            )
        network = network.detach()
        point = repopulation.to_program(network)
        # of the coarsest dtype: features may have been computed in another one than they are in now
        if max(self._first_layer_change(network), self.violation(point)) > max(FEASIBLE.values()):
            raise ValueError("the network's features differ from the frozen ones; freeze a program at this network")
        return point

    def _first_layer_change(self, network: ParticleNetwork) -> float:
        """Largest relative change of a first-layer kernel entry or bias against the frozen ones."""
        pairs = [(self.frozen.kernels[0], network.kernels[0]), (self.frozen.biases[0], network.biases[0])]
        changes = [
            (float((new - old).abs().max()), float(old.abs().max()))
            for old, new in pairs
            if old is not None and new is not None
        ]
        return max(change / max(size, torch.finfo(network.dtype).tiny) for change, size in changes)

    def network(self, point: ProgramPoint) -> ParticleNetwork:
        """The network of a point; particles of zero mass are dropped."""
        return repopulation.to_network(point, self.frozen)

    def output(self, point: ProgramPoint) -> Tensor:
        """F = sum_j <U_j, f_j>, (N, K)."""
        return self.readout_features.flatten(1) @ point.readout.flatten(1).T

    def terms(self, point: ProgramPoint) -> Terms:
        """The terms of the program; the same as the problem's at the network of the point."""
        penalty, loss = self.problem.penalty, self.problem.loss
        fit = loss.value(self.output(point), self.problem.targets).mean()
        source = fit.new_zeros(())
        for W, p in zip(point.kernels, point.masses):
            source = source + perspective(penalty.norms(W).sum(0), p).sum()
        amounts = torch.linalg.vector_norm(point.readout.movedim(1, 0).flatten(1), dim=1)
        readout = perspective(amounts, point.masses[-1]).sum()
        weigh = lambda strength, term: strength * term if strength else torch.zeros_like(term)  # noqa: E731
        return Terms(
            fit, weigh(penalty.source, source), weigh(penalty.readout, readout), point.masses[0] @ self.feature_costs
        )

    def value(self, point: ProgramPoint) -> Tensor:
        """The objective, a 0-dimensional tensor; constraints are judged by `violation`."""
        return self.terms(point).total()

    def residual(self, point: ProgramPoint, layer: int) -> Tensor:
        """sum_i sum_s W_ijs T_s f_i + B_j - p_j g_j of `layer` (>= 1), (N, M_l, H', W')."""
        conv = self.problem.architecture.layers[layer]
        moved = conv.convolve(self.features[layer - 1], point.kernels[layer - 1], point.biases[layer - 1])
        return moved - point.masses[layer][None, :, None, None] * self.preactivations[layer]

    def violation(self, point: ProgramPoint) -> float:
        """Largest violation of any constraint, relative to its own scale.

        Masses: |sum p - 1| and -p M.  Realisation: the largest |residual| over the largest |p_j g_j|, per layer.
        Bounds: the largest excess over B p_j, over B p_j (over B max p where p_j = 0), as `Problem.excess` has it.
        """
        found = [abs(float(p.sum()) - 1) for p in point.masses] + [-float(p.min()) * len(p) for p in point.masses]
        for layer in range(1, self.depth):
            limits.look()
            p = point.masses[layer]
            scale = float((p[None, :, None, None] * self.preactivations[layer]).abs().max())
            found.append(float(self.residual(point, layer).abs().max()) / max(scale, torch.finfo(p.dtype).tiny))
            found.extend(self._bound_excess(point, layer))
        return float(torch.tensor([0.0, *found], dtype=torch.float64).max())  # NaN stays NaN

    def _bound_excess(self, point: ProgramPoint, layer: int) -> list[float]:
        bound, p, bias = self.problem.penalty.amplitude_bound, point.masses[layer], point.biases[layer - 1]
        if bound is None:
            return []
        reached = [self.problem.penalty.norms(point.kernels[layer - 1]).sum(1)] + ([] if bias is None else [bias.abs()])
        return [float(((amount - bound * p) / (bound * torch.where(p > 0, p, p.max()))).max()) for amount in reached]

    def admits(self, point: ProgramPoint) -> bool:
        """Whether a solver may return the point: within `problem.FEASIBLE`, and its network's J is its value.

        J takes every feature as the network computes it, so that a light feature which is off by much of itself, but by
        little of its layer, is found out.
        """
        tolerance = FEASIBLE[point.readout.dtype]
        if not self.violation(point) <= tolerance:
            return False
        value, judged = float(self.value(point)), float(self.problem.value(self.network(point)))
        return abs(judged - value) <= tolerance * abs(value)

    def admitted(self, point: ProgramPoint) -> ProgramPoint | None:
        """The best restored point that a solver may return, or None.

        A solver can take all mass off sources that the features need a little: no restoration on this support meets
        the constraints.  Then all features share a mass s, which costs price s + lambda_s (lack)^2 / s: convex in s, so
        that a few shares, some powers of ten apart, find what it is worth.
        """
        restored = self.restore(point)
        if self.admits(restored):
            return restored
        lack = self.violation(restored)
        if not lack <= 1:
            return None
        revived = (self.restore(_spread(point, share * lack)) for share in REVIVED_SHARES)
        return min(filter(self.admits, revived), key=lambda each: float(self.value(each)), default=None)

    def restore(self, point: ProgramPoint) -> ProgramPoint:
        """A nearby point, on the same support, that meets every constraint to rounding where the support can.

        Masses are clipped and normalised (uniform where none is left); every feature's kernels move by the least sum of
        |dW_ij|^2 / min(p_i M, 1), so that massless features keep zero kernels and light ones move little.  With an
        amplitude bound each feature then moves inside it along its linear constraints, where its sources realise it
        with less than B p_j; one that stays outside is mixed with its frozen kernels, where their sources have mass.
        To the value this costs what the multipliers make of the distance, to second order at an optimum.
        """
        masses = tuple(_normalised(p.clamp_min(0)) for p in point.masses)
        alive = [(p > 0).to(p.dtype) for p in masses]
        kernels, biases = list(point.kernels), list(point.biases)
        for layer in range(1, self.depth):
            carry = alive[layer][:, None, None, None] * alive[layer - 1][None, :, None, None]
            kernels[layer - 1] = kernels[layer - 1] * carry
            bias = biases[layer - 1]
            biases[layer - 1] = None if bias is None else bias * alive[layer]
        readout = point.readout * along_axis(alive[-1], point.readout, 1)
        restored = ProgramPoint(masses, tuple(kernels), readout, tuple(biases))
        for layer in range(1, self.depth):
            restored = self._restore_layer(restored, layer)
        return restored

    def _restore_layer(self, point: ProgramPoint, layer: int) -> ProgramPoint:
        source, target = point.masses[layer - 1], point.masses[layer]
        conv, basis = self.problem.architecture.layers[layer], self.basis(layer)
        scale = (source * len(source)).clamp_max(1).sqrt().repeat_interleave(conv.offsets)
        if conv.bias:
            scale = torch.cat([scale, scale.new_ones(1)])
        solve = least_weighted(basis.right, scale)
        kernels, biases = list(point.kernels), list(point.biases)
        for _ in range(RESTORE_SWEEPS):
            limits.look()
            current = ProgramPoint(point.masses, tuple(kernels), point.readout, tuple(biases))
            error = self.residual(current, layer).movedim(1, 0).flatten(1)  # (M_l, N P)
            step = solve(error @ basis.preimage) * (target > 0)[:, None]
            bias = biases[layer - 1]
            if bias is not None:
                biases[layer - 1] = bias - step[:, -1]
                step = step[:, :-1]
            kernels[layer - 1] = kernels[layer - 1] - step.reshape(kernels[layer - 1].shape)
        bound = self.problem.penalty.amplitude_bound
        if bound is not None:
            rows = _joined(kernels[layer - 1], biases[layer - 1])
            alive = torch.nonzero(target > 0).flatten()
            unit = bound * target[alive, None]
            rows[alive] = unit * self._bounded(layer, alive, rows[alive] / unit, solve, scale)
            kernels[layer - 1], biases[layer - 1] = _parted(rows, kernels[layer - 1].shape, biases[layer - 1])
        return ProgramPoint(point.masses, tuple(kernels), point.readout, tuple(biases))

    def _bounded(
        self, layer: int, alive: Tensor, rows: Tensor, solve: Callable[[Tensor], Tensor], scale: Tensor
    ) -> Tensor:
        """Rows (W_j, B_j) / (B p_j) of the features `alive`, moved inside the bounds; their coordinates are right."""
        kernel, bias = self.frozen.kernels[layer], self.frozen.biases[layer]
        bounds = BoundedRows(self.problem.penalty, tuple(kernel.shape[1:]), scale, bias is not None)
        rows = into_bounds(rows, self.basis(layer).right, solve, bounds)
        anchors, own = self._anchors(layer)
        anchors, own = anchors[alive], own[alive]
        usable = own & ~(anchors[:, scale == 0] != 0).any(1) & (bounds.excess(rows) > FEASIBLE[rows.dtype])
        return torch.where(usable[:, None], towards(rows, anchors, bounds), rows)

    def _anchors(self, layer: int) -> tuple[Tensor, Tensor]:
        """The frozen network's rows (w_ij p_i, b_j) / B, and which realise their g_j: those of candidates need not."""
        source, bias, g = self.frozen.masses[layer - 1], self.frozen.biases[layer], self.preactivations[layer]
        flows = self.frozen.kernels[layer] * source[None, :, None, None]
        error = self.problem.architecture.layers[layer].convolve(self.features[layer - 1], flows, bias) - g
        size = lambda maps: maps.abs().amax((0, 2, 3))  # noqa: E731
        realised = size(error) <= FEASIBLE[g.dtype] * size(g)
        return _joined(flows, bias) / (self.problem.penalty.amplitude_bound or math.inf), realised


def _joined(kernels: Tensor, bias: Tensor | None) -> Tensor:
    """(W_j, B_j) as rows (M_l, columns)."""
    rows = kernels.flatten(1)
    return rows.clone() if bias is None else torch.cat([rows, bias[:, None]], 1)


def _parted(rows: Tensor, shape: torch.Size, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What `_joined` joined."""
    return (rows.reshape(shape), None) if bias is None else (rows[:, :-1].reshape(shape), rows[:, -1])


def _spread(point: ProgramPoint, share: float) -> ProgramPoint:
    """The point with a share of the mass of every layer spread evenly."""
    masses = (_normalised(p.clamp_min(0)) for p in point.masses)
    return replace(point, masses=tuple((1 - share) * p + share / len(p) for p in masses))


def _normalised(masses: Tensor) -> Tensor:
    total = masses.sum()
    return torch.where(total > 0, masses / total, 1 / len(masses))
